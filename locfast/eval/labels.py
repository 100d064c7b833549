"""From label maps to what the probe must say: the union of the classes in a patch, or in an image."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = 255
"""Pixels with this id count for nothing."""


def classes_in_patches(
    label_map: Tensor, patch_size: tuple[int, int], num_classes: int, unlabeled: int | None = 0
) -> Tensor:
    """label_map [B, H, W] uint8 -> [B, N, num_classes] bool: the classes in every patch.

    `unlabeled` is a class as others are, but drops out of a patch that holds any other class (public reference
    of the probe); None: no id is special.
    """
    batch, height, width = label_map.shape
    ph, pw = patch_size
    cells = label_map.view(batch, height // ph, ph, width // pw, pw).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
    present = _union(cells, num_classes)
    if unlabeled is not None:
        others = present.clone()
        others[..., unlabeled] = False
        present[..., unlabeled] &= ~others.any(-1)
    return present


def classes_in_image(label_map: Tensor, num_classes: int) -> Tensor:
    """label_map [B, H, W] uint8 -> [B, num_classes] bool; the unlabeled class stays where it occurs."""
    return _union(label_map.flatten(1), num_classes)


def _union(ids: Tensor, num_classes: int) -> Tensor:
    """ids [..., M] -> [..., num_classes] bool. Ids that are no class (255) mark nothing."""
    present = torch.zeros(*ids.shape[:-1], 256, dtype=torch.bool, device=ids.device)
    present.scatter_(-1, ids.long(), True)
    return present[..., :num_classes]
