"""What is said of a scene: a box and a phrase for every object in sight, and a caption that names them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def boxes_in_sight(front: Tensor, objects: int, min_pixels: int) -> Tensor:
    """Boxes of the pixels where the objects 1 .. `objects` are in front: [B, h, w] uint8 -> [B, objects, 4] int16.

    Left, top, right, bottom; a box ends behind its last pixel, so that a whole picture is 0, 0, w, h. -1 for objects of
    which less than `min_pixels` pixels are in sight.
    """
    ids = torch.arange(1, objects + 1, dtype=torch.uint8, device=front.device)
    pixels = front[:, None] == ids[:, None, None]
    columns, rows = pixels.any(2).byte(), pixels.any(3).byte()
    first = [line.argmax(-1) for line in (columns, rows)]
    last = [line.shape[-1] - line.flip(-1).argmax(-1) for line in (columns, rows)]
    boxes = torch.stack([*first, *last], -1).short()
    return torch.where((pixels.sum((2, 3)) >= min_pixels)[..., None], boxes, -1)


def phrase(body: str, core: str, shape: str) -> str:
    """What an object is called, by the colours of its body and its core."""
    return f"a {body} {shape} with a {core} core"


def caption(phrases: Sequence[str]) -> str:
    """A text that names all of a scene's objects, of which there is at least one."""
    *others, last = phrases
    return f"{', '.join(others)} and {last}" if others else last
