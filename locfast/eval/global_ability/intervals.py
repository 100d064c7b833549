"""95 % intervals of accuracies and of their differences, by a paired bootstrap over validation images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

DRAWS = 10_000
Interval = tuple[float, float]


def bootstrap(right: Mapping[str, Tensor], seed: int = 0, draws: int = DRAWS) -> dict[str, np.ndarray]:
    """Accuracies of resampled validation sets: {name: [draws] fp64}; draw i holds the same images for every name.

    right: which images each model got right, [M] bool each. Images that the same models got right are alike for an
    accuracy, so how many of each kind a resample holds is drawn at once (a multinomial): the same distribution as
    drawing M images with replacement, and no M x draws numbers.
    """
    table = np.stack([np.asarray(one.numpy(), dtype=bool) for one in right.values()], axis=1)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    total = len(table)
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=draws)
    accuracy = drawn @ kinds.astype(np.float64) / total
    return {name: accuracy[:, place] for place, name in enumerate(right)}


def interval(values: np.ndarray) -> Interval:
    """The 2.5th and the 97.5th percentile."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
