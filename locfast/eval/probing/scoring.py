"""Recall, precision, F1 and average precision of every class, and their macro averages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from locfast.eval.probing.results import Counts

MOST = 1 << 28
"""Scores that are sorted at a time (2 GiB of indices)."""


@dataclass(frozen=True)
class Scores:
    """Of a head on a set of images."""

    macro: dict[str, float]
    """recall, precision, f1, ap: means over the classes that some patch (or image) has."""
    classes: dict[str, list[float | None]]
    counts: Counts


class Tally:
    """Counts answers batch by batch. ranked: keeps scores too, on the CPU, for average precision.

    A class that is never told has precision 0, as scikit-learn's `zero_division=0`.
    """

    def __init__(self, ranked: bool = True) -> None:
        self.ranked = ranked
        self.counts: list[tuple[Tensor, ...]] = []
        self.ranks: list[tuple[Tensor, Tensor]] = []

    def add(self, told: Tensor, ranks: Tensor, truth: Tensor, counted: Tensor | None = None) -> None:
        """told, truth (bool) and ranks [B, N, K], or [B, K] of whole images; counted [B, N] or [B] bool (None: all)."""
        if truth.ndim == 2:
            told, ranks, truth = (tensor[:, None] for tensor in (told, ranks, truth))
            counted = None if counted is None else counted[:, None]
        if counted is not None:
            told, truth = told & counted[..., None], truth & counted[..., None]
        self.counts.append(tuple(part.sum(1, dtype=torch.int32).cpu() for part in (told & truth, told, truth)))
        if self.ranked:
            rows = slice(None) if counted is None else counted.flatten()
            self.ranks.append((ranks.flatten(0, 1)[rows].float().cpu(), truth.flatten(0, 1)[rows].cpu()))

    def scores(self, device: torch.device | str = "cpu") -> Scores:
        """Of all that was added; average precision is sorted on `device`. ValueError where no patch has a class."""
        counts = Counts(*(torch.cat(part).numpy() for part in zip(*self.counts, strict=True)))
        if not self.ranked:
            return summarise(counts, None)
        ranks, truth = (torch.cat(part) for part in zip(*self.ranks, strict=True))
        return summarise(counts, average_precision(ranks, truth, device).tolist())


def score(logits: Tensor, truth: Tensor, counted: Tensor | None = None) -> Scores:
    """logits, truth (bool) [M, N, K], or [M, K] of whole images. A class is told where its probability is above 1/2.

    counted [M, N] bool: patches that have a label (None: all). Raises ValueError where no patch has a class.
    """
    tally = Tally()
    tally.add(logits > 0, logits, truth, counted)
    return tally.scores()


def summarise(counts: Counts, ap: list[float] | None) -> Scores:
    """Scores from counts, summed over images, and each class's average precision where it is known."""
    hits, told, there = (part.sum(0, dtype=np.int64) for part in (counts.hits, counts.told, counts.there))
    has = there > 0
    if not has.any():
        raise ValueError("no class is anywhere: nothing to measure recall on")
    values = {
        "recall": hits / np.maximum(there, 1),
        "precision": hits / np.maximum(told, 1),
        "f1": 2 * hits / np.maximum(told + there, 1),
        **({} if ap is None else {"ap": np.array(ap)}),
    }
    macro = {name: float(value[has].mean()) for name, value in values.items()}
    classes = {
        name: [float(one) if ok else None for one, ok in zip(value, has, strict=True)] for name, value in values.items()
    }
    return Scores(macro, classes, counts)


def average_precision(scores: Tensor, truth: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """scores, truth (bool) [M, K] -> [K] fp64: sum over distinct scores, from the highest, of (R_n - R_{n-1}) P_n.

    As scikit-learn's average_precision_score: equal scores count as one threshold. NaN for a class without positives.
    A block of classes at a time comes to `device`.
    """
    step = max(1, MOST // max(1, len(scores)))
    blocks = (slice(i, i + step) for i in range(0, scores.shape[1], step))
    parts = [_average_precision(scores[:, block].to(device), truth[:, block].to(device)) for block in blocks]
    return torch.cat(parts).cpu()


def _average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    ordered, order = scores.float().T.contiguous().sort(dim=1, descending=True)
    right = truth.T.gather(1, order)
    hits = right.cumsum(1, dtype=torch.int32)
    last = torch.ones_like(right)  # of several equal scores, the last one sees all of their hits
    last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    # Every threshold adds the hits since the one before it, times its precision.
    seen = torch.where(last, hits, 0)
    before = torch.zeros_like(seen)
    before[:, 1:] = seen.cummax(1).values[:, :-1]
    gained = torch.where(last, hits - before, 0)
    rank = torch.arange(1, ordered.shape[1] + 1, device=scores.device, dtype=torch.float64)
    total = (gained * (hits / rank)).sum(1)
    return total / hits[:, -1].double()
