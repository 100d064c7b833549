"""A detector's boxes as regions of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from locfast.data.spec import Region

SMALLEST = 1.0
"""Pixels that a box must have on each side, once it is clipped to the image."""


def regions(
    scores: Tensor,
    labels: Tensor,
    boxes: Tensor,
    phrases: Sequence[str],
    size: tuple[int, int],
    *,
    side: int,
    inside: tuple[int, int],
    min_score: float = 0.1,
    nms: float | None = None,
    max_regions: int | None = None,
) -> tuple[tuple[Region, ...], int]:
    """Regions with a score above `min_score`, the surest first, and how many such boxes were dropped as degenerate.

    scores, labels [N] and boxes [N, 4] of one image as `Detector.detect` gives them, on the CPU; size: its height and
    width, which are shown in the `inside` (height, width) of a frame of `side` pixels, see `pixels.Framed`. Boxes are
    clipped to the image; what is thinner than a pixel then, as in the padding, or not finite, is degenerate. nms: of
    boxes of one phrase that overlap by more (intersection over union), only the surest. Pixels to 1/100, scores to
    1/10000.
    """
    height, width = size
    sure = (scores > min_score).nonzero()[:, 0]
    order = sure[scores[sure].argsort(descending=True, stable=True)]
    x, y, w, h = (boxes[order].double() * _scale(size, side, inside)).unbind(-1)
    edges = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    corners = edges.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=torch.float64))
    whole = edges.isfinite().all(-1) & ((corners[:, 2:] - corners[:, :2]) >= SMALLEST).all(-1)
    kept, corners = order[whole], corners[whole]
    if nms is not None:
        from torchvision.ops import batched_nms

        chosen = batched_nms(corners.float(), scores[kept].float(), labels[kept], nms)
        kept, corners = kept[chosen], corners[chosen]
    found = [
        Region(_rounded(box), phrases[label], round(score, 4))
        for box, label, score in zip(corners.tolist(), labels[kept].tolist(), scores[kept].tolist(), strict=True)
    ]
    return tuple(found[:max_regions]), int((~whole).sum())


def _scale(size: tuple[int, int], side: int, inside: tuple[int, int]) -> Tensor:
    """Shares of the frame to pixels of the image. The shown part is of whole pixels, so that its axes differ a bit."""
    high, wide = (side * full / shown for full, shown in zip(size, inside, strict=True))
    return torch.tensor([wide, high, wide, high], dtype=torch.float64)


def _rounded(box: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (round(edge, 2) for edge in box)
    return left, top, right, bottom
