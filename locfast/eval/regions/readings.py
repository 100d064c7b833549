"""Two ways to read a box off an image's tokens: by what was trained to, and by RoI-align."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.eval.global_ability.features import Tower
from locfast.models.prompter import Asked, RoiPooler, roi_means

PROMPTER, ROI_ALIGN = "prompter", "RoI-align"


class RegionReading(Protocol):
    """As `Prompter` and `RoiPooler`."""

    def ask(self, tokens: Tensor) -> Asked:
        """Patch tokens behind the final norm [B, N, C] -> what all boxes of an image share."""

    def boxes(self, asked: Asked, boxes: Tensor, rows: Tensor | None = None) -> Tensor:
        """Boxes [K, 4] in [0, 1] of the view, of the images that rows [K] numbers -> [K, E]."""


@dataclass(frozen=True)
class RoiReading:
    """Patch tokens put into the joint space one by one, as if each were all of the image, and their RoI-aligned mean.

    With CLIP's linear projection of the CLS token that is the projection of every patch; an attention pooling (SigLIP)
    pools each token alone.
    """

    embed: Callable[[Tensor], Tensor]
    grid: tuple[int, int]
    size: int

    def ask(self, tokens: Tensor) -> Asked:
        alone = self.embed(tokens.flatten(0, 1)[:, None])
        return Asked(alone.unflatten(0, tokens.shape[:2]))

    def boxes(self, asked: Asked, boxes: Tensor, rows: Tensor | None = None) -> Tensor:
        return roi_means(asked.tokens, self.grid, boxes, rows, self.size)


def readings_of(tower: Tower, prompter: nn.Module | None, size: int) -> Mapping[str, RegionReading]:
    """By name; a model that was trained with RoI-align has its own pooling there. size: samples along a side.

    Raises UserError where that pooling was trained on another grid than the tower has.
    """
    trained: Any = prompter
    if isinstance(prompter, RoiPooler):
        if prompter.grid != tuple(tower.backbone.grid):
            there, here = (" x ".join(map(str, grid)) for grid in (prompter.grid, tower.backbone.grid))
            raise UserError(
                f"--image-size: its RoI-align was trained on {there} patches, here are {here}. Leave it out."
            )
        return {ROI_ALIGN: trained}
    own = {} if prompter is None else {PROMPTER: trained}
    return {**own, ROI_ALIGN: RoiReading(tower.embed, tower.backbone.grid, size)}


@torch.inference_mode()
def embed_boxes(reading: RegionReading, patches: Tensor, boxes: Tensor, rows: Tensor, chunk: int) -> Tensor:
    """Patches [B, N, C], boxes [K, 4] and their images' numbers rows [K] -> [K, E] fp32, `chunk` boxes at a time."""
    some, numbers = rows.unique(return_inverse=True)
    asked = reading.ask(patches.index_select(0, some))
    parts = zip(boxes.split(chunk), numbers.split(chunk), strict=True)
    return torch.cat([reading.boxes(asked, box, number).float() for box, number in parts])
