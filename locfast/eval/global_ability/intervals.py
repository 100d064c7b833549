"""95 % intervals of accuracies and of their differences, by a paired bootstrap over validation images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

DRAWS = 10_000
DRAWN = 1 << 22
"""Counts of kinds that are drawn at a time; questions of images that differ in number make many kinds."""
Interval = tuple[float, float]


def bootstrap(
    right: Mapping[str, Tensor], seed: int = 0, draws: int = DRAWS, of: Tensor | None = None
) -> dict[str, np.ndarray]:
    """Accuracies of resampled validation sets: {name: [draws] fp64}; draw i holds the same images for every name.

    right: which images each model got right, [M] bool each; or how many of an image's questions, [M] int64, with
    `of` [M] int64 the number of its questions. Images that the same models got right are alike for an accuracy, so how
    many of each kind a resample holds is drawn at once (a multinomial): the same distribution as drawing M images
    with replacement, and no M x draws numbers.
    """
    asked = np.ones(len(next(iter(right.values()))), dtype=np.int64) if of is None else of.numpy()
    table = np.stack([asked, *(one.numpy().astype(np.int64) for one in right.values())], axis=1)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    random, step = np.random.default_rng(seed), max(1, DRAWN // len(kinds))
    parts = []
    for start in range(0, draws, step):
        drawn = random.multinomial(len(table), counts / len(table), size=min(step, draws - start))
        sums = drawn @ kinds.astype(np.float64)
        parts.append(sums[:, 1:] / sums[:, :1])
    accuracy = np.concatenate(parts)
    return {name: accuracy[:, place] for place, name in enumerate(right)}


def bootstrap_per_class(
    right: Mapping[str, Tensor], labels: Tensor, image_of: Tensor, seed: int = 0, draws: int = DRAWS
) -> dict[str, np.ndarray]:
    """Means over classes of the accuracy in each, on resampled images: {name: [draws] fp64}.

    right: which questions each model got right, [R] bool; labels [R] int64 their classes, image_of [R] int64 their
    images, which are drawn with all of their questions. A class that a resample lacks is left out of its mean.
    """
    _, label = labels.unique(return_inverse=True)
    images, image = image_of.unique(return_inverse=True)
    classes, count = int(label.max()) + 1, len(images)
    rows = torch.cat([label + classes * place for place in range(1 + len(right))])
    values = torch.cat([torch.ones(len(labels)), *right.values()]).float()  # counts, exact below 2^24
    where = torch.stack([rows, image.repeat(1 + len(right))])
    shape = (classes * (1 + len(right)), count)
    with torch.sparse.check_sparse_tensor_invariants():  # without a word on it torch warns
        table = torch.sparse_coo_tensor(where, values, shape).coalesce()
    random, step = np.random.default_rng(seed), max(1, DRAWN // max(count, len(table)))
    parts = []
    for start in range(0, draws, step):
        some = min(step, draws - start)
        drawn = random.integers(count, size=(some, count)) + count * np.arange(some)[:, None]
        times = np.bincount(drawn.ravel(), minlength=some * count).reshape(some, count).astype(np.float32)
        counts = torch.from_numpy(times).T.contiguous()  # as it lies it would cost ten times as much
        sums = torch.sparse.mm(table, counts).double().view(1 + len(right), classes, some)
        there = sums[0] > 0
        parts.append((sums[1:] / sums[0].clamp(min=1)).sum(1) / there.sum(0))
    means = torch.cat(parts, 1).numpy()
    return {name: means[place] for place, name in enumerate(right)}


def interval(values: np.ndarray) -> Interval:
    """The 2.5th and the 97.5th percentile."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
