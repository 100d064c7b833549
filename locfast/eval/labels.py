"""From label maps to what the probe must say: the classes in a patch (all, or the most frequent), or in an image."""

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
    of the probe); None: no id is special. Raises ValueError where patches do not tile the map.
    """
    present = _union(_patches(label_map, patch_size), num_classes)
    if unlabeled is not None:
        others = present.clone()
        others[..., unlabeled] = False
        present[..., unlabeled] &= ~others.any(-1)
    return present


def majority_in_patches(
    label_map: Tensor, patch_size: tuple[int, int], num_classes: int, unlabeled: int | None = 0
) -> Tensor:
    """label_map [B, H, W] uint8 -> [B, N] int64: the most frequent class of every patch, of several the smallest id.

    `unlabeled` counts only where nothing else is there, as in `classes_in_patches`; -1 where no pixel has a class
    (all are 255). Raises ValueError where patches do not tile the map.
    """
    counts = _counts(_patches(label_map, patch_size), num_classes)
    if unlabeled is not None:  # one object pixel wins over any number of unlabeled ones
        counts[..., unlabeled] *= counts.sum(-1) == counts[..., unlabeled]
    most = counts.argmax(-1)  # the first of several maxima, as torch documents it
    return torch.where(counts.amax(-1) > 0, most, -1)


def classes_in_image(label_map: Tensor, num_classes: int) -> Tensor:
    """label_map [B, H, W] uint8 -> [B, num_classes] bool; the unlabeled class stays where it occurs."""
    return _union(label_map.flatten(1), num_classes)


def class_share_in_image(label_map: Tensor, num_classes: int) -> Tensor:
    """label_map [B, H, W] uint8 -> [B, num_classes] fp32: the share of the image's pixels that every class has.

    Pixels of 255 are pixels of the image, so that an image's shares may add up to less than 1.
    """
    pixels = label_map.flatten(1)
    return (_counts(pixels, num_classes).double() / pixels.shape[1]).float()


def _patches(label_map: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """[B, H, W] -> [B, N, pixels of a patch], patches row by row."""
    batch, height, width = label_map.shape
    ph, pw = patch_size
    if height % ph or width % pw:
        raise ValueError(f"patches of {ph} x {pw} do not tile a label map of {height} x {width} (height x width)")
    return label_map.view(batch, height // ph, ph, width // pw, pw).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def _bins(ids: Tensor, num_classes: int) -> Tensor:
    """Ids as indices of num_classes + 1 bins; what is no class (255, and ids out of range) shares the last one.

    int64, as scatter wants it: 58 MB for 64 images of 336 x 336.
    """
    return ids.long().clamp_(max=num_classes)


def _union(ids: Tensor, num_classes: int) -> Tensor:
    """ids [..., M] -> [..., num_classes] bool."""
    present = torch.zeros(*ids.shape[:-1], num_classes + 1, dtype=torch.bool, device=ids.device)
    return present.scatter_(-1, _bins(ids, num_classes), True)[..., :num_classes]


def _counts(ids: Tensor, num_classes: int) -> Tensor:
    """ids [..., M] -> [..., num_classes] int32: how many of each; the order of adding integers is no matter."""
    counts = torch.zeros(*ids.shape[:-1], num_classes + 1, dtype=torch.int32, device=ids.device)
    one = torch.ones((), dtype=torch.int32, device=ids.device).expand(ids.shape)
    return counts.scatter_add_(-1, _bins(ids, num_classes), one)[..., :num_classes]
