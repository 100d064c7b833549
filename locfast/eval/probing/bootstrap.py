"""Intervals of a probe's scores: what they would be with other images and other seeds of the same kind.

Images are drawn with replacement, and so are the seeds where there are several; every draw scores all backbones on the
same images and seeds, so a difference between two of them is that of pairs. No head is trained anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from locfast.eval.probing.results import Counts

RESAMPLES = 1000
"""Draws: a bound of a 95 % interval then rests on 25 of them."""
Interval = dict[str, float]
"""A figure as measured, and the bounds of its 95 % interval: "value", "low", "high"."""


@dataclass(frozen=True)
class Resamples:
    """How often every draw holds each image: [R, M] fp64, rows that sum to M. The same numbers on every machine."""

    images: np.ndarray
    seed: int

    @classmethod
    def of(cls, images: int, resamples: int = RESAMPLES, seed: int = 0) -> Resamples:
        return cls(_draw(images, resamples, seed, "probe.bootstrap.images"), seed)

    def seeds(self, count: int) -> np.ndarray:
        """The share of every draw that each of `count` seeds has: [R, count], rows that sum to 1."""
        return _draw(count, len(self.images), self.seed, "probe.bootstrap.seeds") / count


def _draw(count: int, resamples: int, seed: int, stream: str) -> np.ndarray:
    """How often each of `count` things is among `count` drawn with replacement: [resamples, count] fp64."""
    import torch  # here: a report of figures that are all there needs no torch, which takes seconds to import

    from locfast.random import Keys, randint

    keys = Keys(seed, torch.zeros(resamples, dtype=torch.int64), torch.arange(resamples))
    drawn = randint(keys, stream, count, count).numpy() + np.arange(resamples)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(np.float64)


def ratios(hits: np.ndarray, told: np.ndarray, there: np.ndarray) -> dict[str, np.ndarray]:
    """Recall, precision and F1 by class from counts [..., K]; NaN where a class has no positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        none = np.where(there > 0, 0.0, np.nan)
        return {
            "recall": hits / there,
            "precision": hits / np.maximum(told, 1) + none,
            "f1": 2 * hits / (told + there) + none,
        }


def measured(runs: Sequence[Counts]) -> dict[str, np.ndarray]:
    """Recall, precision and F1 by class [K], each the mean over seeds (one `Counts` a seed)."""
    each = [ratios(*(part.sum(0, dtype=np.float64) for part in (one.hits, one.told, one.there))) for one in runs]
    return {name: np.mean([one[name] for one in each], 0) for name in each[0]}


def resampled(runs: Sequence[Counts], draws: Resamples) -> dict[str, np.ndarray]:
    """The same in every draw: [R, K] each. NaN where a draw holds no image with the class."""
    share = draws.seeds(len(runs))
    found: dict[str, np.ndarray] = {}
    for number, one in enumerate(runs):
        sums = (draws.images @ part.astype(np.float64) for part in (one.hits, one.told, one.there))
        for name, values in ratios(*sums).items():
            weighted = values * share[:, number, None]
            found[name] = found[name] + weighted if number else weighted
    return found


def macro(classes: np.ndarray) -> np.ndarray:
    """Mean over the classes [..., K] that have a positive; NaN where none has."""
    there = ~np.isnan(classes)
    with np.errstate(invalid="ignore"):
        return np.where(there, classes, 0.0).sum(-1) / np.where(there.any(-1), there.sum(-1), np.nan)


def interval(value: float, draws: np.ndarray) -> Interval:
    """`value` between the 2.5th and the 97.5th percentile of its draws [R] (those that gave a figure)."""
    kept = draws[~np.isnan(draws)]
    low, high = np.percentile(kept, (2.5, 97.5)) if len(kept) else (np.nan, np.nan)
    return {"value": float(value), "low": float(low), "high": float(high)}
