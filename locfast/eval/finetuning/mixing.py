"""Mixup and CutMix of a whole batch with its labels: timm's, drawing from (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from locfast.eval.finetuning.recipe import Recipe
from locfast.random import Keys, random_words


def mix(
    images: Tensor, labels: Tensor, num_classes: int, recipe: Recipe, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """images [B, 3, H, W], changed in place, labels [B] int64 -> mixed images, smoothed targets [B, K] fp32.

    Every step mixes, half of them by CutMix where both are on; partners are the batch in reverse order, so B is even.
    How the batch is cut into micro-batches later changes nothing.
    """
    if not (recipe.mixup or recipe.cutmix):
        return images, mixup_target(labels, num_classes, smoothing=recipe.smoothing)
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)
    with _numpy_seeded(random_words(Keys.of(seed, step, 0), "finetune.mix", 4)[0].tolist()):
        return mixup(images, labels)


def torch_seed(seed: int, step: int, round_: int) -> int:
    """What torch's generators are seeded with before micro-batch `round_` of a step: for the drop path."""
    high, low = random_words(Keys(seed, torch.tensor([step]), torch.tensor([round_])), "finetune.torch", 2)[0].tolist()
    return high << 31 | low >> 1


@contextmanager
def _numpy_seeded(words: list[int]) -> Iterator[None]:
    """timm's Mixup draws from numpy's global generator: seeded inside, and put back."""
    before = np.random.get_state()
    np.random.seed(words)
    try:
        yield
    finally:
        np.random.set_state(before)
