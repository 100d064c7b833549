"""Mixup and CutMix between the images of a micro-batch (ablations of the paper's section 4.2).

A self-distilled method has no labels to mix: teacher and student simply see the mixed image. Partners come from the
same micro-batch, reversed, so unlike masks and crops these ablations do depend on how a batch is cut up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from locfast.random import Keys, random_words, uniform


@dataclass(frozen=True)
class Mix:
    """How much of itself every image keeps, and where CutMix pastes its partner."""

    keep: Tensor  # [B] fp32 in [0, 1]
    centre: Tensor | None  # [B, 2] fp32 in [0, 1): row and column of the pasted box's centre; None for mixup


def draw_mix(keys: Keys, mixup: float, cutmix: float) -> Mix | None:
    """A Mix with keep ~ Beta(alpha, alpha) per image; with both alphas set, half of the batches get either."""
    if not mixup and not cutmix:
        return None
    use_cutmix = bool(cutmix) and (not mixup or bool(uniform(keys, "mix.kind", 1)[0, 0] < 0.5))
    alpha = cutmix if use_cutmix else mixup
    # torch has no keyed Beta; numpy's generator is, and ablations can afford its trip over the host.
    words = random_words(keys, "mix.keep", 4).cpu().tolist()
    keep = torch.tensor([np.random.default_rng(w).beta(alpha, alpha) for w in words], dtype=torch.float32)
    centre = uniform(keys, "mix.centre", 2) if use_cutmix else None
    return Mix(keep.to(keys.index.device), centre)


def mix_images(images: Tensor, mix: Mix | None) -> Tensor:
    """images [B, 3, H, W] blended with, or pasted over by, the batch in reverse order."""
    if mix is None:
        return images
    partner = images.flip(0)
    if mix.centre is None:
        keep = mix.keep.view(-1, 1, 1, 1).to(images.dtype)
        return images * keep + partner * (1 - keep)
    height, width = images.shape[-2:]
    half = (1 - mix.keep).sqrt() / 2
    row = (torch.arange(height, device=images.device) + 0.5) / height
    column = (torch.arange(width, device=images.device) + 0.5) / width
    in_rows = (row - mix.centre[:, :1]).abs() < half[:, None]
    in_columns = (column - mix.centre[:, 1:]).abs() < half[:, None]
    pasted = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(pasted, partner, images)
