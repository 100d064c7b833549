"""What heads must say of every image, packed: a bit for each class, or the id of a patch's most frequent one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locfast.eval.heads import Task
from locfast.eval.labels import class_share_in_image, classes_in_image, classes_in_patches, majority_in_patches
from locfast.eval.probing.settings import Labels


@dataclass(frozen=True)
class Targets:
    """Of M images: `local` [M, N, bytes] uint8 (union) or [M, N] int16 (majority, -1: none), `whole` [M, bytes] uint8,
    `shares` [M, K] fp32."""

    local: Tensor
    whole: Tensor
    shares: Tensor
    num_classes: int

    @classmethod
    def of(
        cls, label_map: Tensor, patch_size: tuple[int, int], num_classes: int, unlabeled: int | None, labels: Labels
    ) -> Targets:
        """Of label maps [M, H, W] uint8; pixels beyond the last whole patch are in no patch, and in the image."""
        height, width = (side // patch * patch for side, patch in zip(label_map.shape[1:], patch_size, strict=True))
        shown = label_map[:, :height, :width]
        local = (
            pack(classes_in_patches(shown, patch_size, num_classes, unlabeled))
            if labels == "union"
            else majority_in_patches(shown, patch_size, num_classes, unlabeled).short()
        )
        shares = class_share_in_image(label_map, num_classes)
        return cls(local, pack(classes_in_image(label_map, num_classes)), shares, num_classes)

    def unions(self, rows: Tensor) -> Tensor:
        """Classes of the patches of `rows`: bool [B, N, K]; of majority labels the one, or none."""
        local = self.local[rows]
        if local.ndim == 3:
            return unpack(local, self.num_classes)
        return local[..., None] == torch.arange(self.num_classes, device=local.device)

    def images(self, rows: Tensor) -> Tensor:
        """Classes of the whole images: bool [B, K]."""
        return unpack(self.whole[rows], self.num_classes)

    def say_something(self, task: Task, rows: Tensor) -> bool:
        """Whether any class is in any patch (local), or image (global), of `rows`."""
        told = (self.whole if task == "global" else self.local)[rows]
        return bool((told > 0 if told.dtype == torch.uint8 else told >= 0).any())

    def to(self, device: torch.device) -> Targets:
        return Targets(self.local.to(device), self.whole.to(device), self.shares.to(device), self.num_classes)

    def shuffled(self, order: Tensor) -> Targets:
        """Every image with the labels of another one."""
        return Targets(self.local[order], self.whole[order], self.shares[order], self.num_classes)


def pack(present: Tensor) -> Tensor:
    """bool [..., K] -> uint8 [..., ceil(K / 8)], class 0 in the lowest bit of the first byte."""
    padded = torch.nn.functional.pad(present.to(torch.uint8), (0, -present.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, device=present.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, num_classes: int) -> Tensor:
    """What `pack` packed."""
    bits = packed[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
    return bits.flatten(-2)[..., :num_classes].bool()
