"""What a probe's counts say beyond one figure: by class, by size, against the trend (Locality Alignment, B.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from locfast.eval.probing.bootstrap import Interval, Resamples, interval, macro, measured, resampled
from locfast.eval.probing.results import Counts, ProbeResult

TOP = 10
"""Classes in a list of the most improved (figure 7)."""
BINS = 10
"""Of object size (figure 8)."""
SCORES = ("recall", "precision", "f1")


def scores(runs: Sequence[Counts], draws: Resamples) -> tuple[dict[str, Interval], dict[str, np.ndarray]]:
    """Macro recall, precision and F1 with intervals, mean over seeds; and their draws [R], for differences of pairs."""
    exact, drawn = measured(runs), resampled(runs, draws)
    every = {name: macro(drawn[name]) for name in SCORES}
    return {name: interval(float(macro(exact[name])), every[name]) for name in SCORES}, every


def class_gains(before: Sequence[Counts], after: Sequence[Counts], draws: Resamples) -> list[Interval | None]:
    """By class: recall after less recall before, in shares of 1, with intervals; None where a class has no positive."""
    exact = measured(after)["recall"] - measured(before)["recall"]
    drawn = resampled(after, draws)["recall"] - resampled(before, draws)["recall"]
    return [None if np.isnan(one) else interval(one, drawn[:, k]) for k, one in enumerate(exact)]


def most_improved(gains: Sequence[Interval | None], among: Sequence[int] | None = None, top: int = TOP) -> list[int]:
    """The classes that gained most, the first one most, of those in `among` (None: of all)."""
    known = [k for k in (range(len(gains)) if among is None else among) if gains[k] is not None]
    return sorted(known, key=lambda k: (-(gains[k] or {})["value"], k))[:top]


def kinds(classes: int, things: Sequence[int] | None, unlabeled: int | None) -> dict[str, list[int]]:
    """Class ids as {"things": ..., "stuff": ...}, or {"all": ...} where the data do not tell; unlabeled is neither."""
    known = [k for k in range(classes) if k != unlabeled]
    if things is None:
        return {"all": known}
    split = {"things": [k for k in known if k in set(things)], "stuff": [k for k in known if k not in set(things)]}
    return {name: ids for name, ids in split.items() if ids}


def size_edges(
    shares: np.ndarray, there: np.ndarray, quantiles: bool = False, bins: int = BINS, unlabeled: int | None = None
) -> np.ndarray:
    """Edges of `bins` bins [bins + 1] of the share of an image that an object holds.

    Of equal width (0 to 10 %, ..., 90 to 100 %), or with as many objects in each; the unlabeled class is none.
    shares, there [M, K].
    """
    if not quantiles:
        return np.linspace(0.0, 1.0, bins + 1)
    objects = there > 0
    if unlabeled is not None:
        objects[:, unlabeled] = False
    held = shares[objects]
    inner = np.quantile(held, np.linspace(0.0, 1.0, bins + 1)[1:-1]) if len(held) else np.linspace(0, 1, bins + 1)[1:-1]
    return np.concatenate([[0.0], inner, [1.0]])


def size_bins(shares: np.ndarray, there: np.ndarray, edges: np.ndarray, unlabeled: int | None = None) -> np.ndarray:
    """The bin of every class in every image, [M, K] int: low edge included, -1 where the class is not there.

    Also -1 for the unlabeled class, which is no object.
    """
    found = np.clip(np.searchsorted(edges.astype(np.float32), shares.astype(np.float32), side="right") - 1, 0, None)
    found = np.where(there > 0, np.minimum(found, len(edges) - 2), -1)
    if unlabeled is not None:
        found[:, unlabeled] = -1
    return found


def size_recall(
    runs: Sequence[Counts], bins: np.ndarray, number: int, draws: Resamples
) -> list[tuple[dict[str, Any], np.ndarray] | None]:
    """Macro recall in each of `number` bins of object size, over the classes that have positives there.

    Gives, by bin, {"objects", "classes", "value", "low", "high"} and the draws [R]; None where a bin is empty. An
    object is a class in an image: two cups of one image count as one.
    """
    found: list[tuple[dict[str, Any], np.ndarray] | None] = []
    for which in range(number):
        inside = bins == which
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            found.append(None)
            continue
        cut = np.ix_(rows, columns)
        part = [Counts(*(x[cut] * inside[cut] for x in (one.hits, one.told, one.there))) for one in runs]
        drawn = macro(resampled(part, Resamples(draws.images[:, rows], draws.seed))["recall"])
        about: dict[str, Any] = {"objects": int(inside.sum()), "classes": len(columns)}
        found.append((about | interval(float(macro(measured(part)["recall"])), drawn), drawn))
    return found


def relative_locality(points: Mapping[str, tuple[float, float]], trend: Sequence[str]) -> dict[str, Any]:
    """How far every model's local recall lies above what its global recall lets expect (figure 9, left).

    points: by model, (global, local). trend: the models that the least-squares line of local against global goes
    through, the unaligned ones. {"slope", "intercept", "trend", "residuals"}, or {"absent": why there is no line}.
    """
    if len(trend) < 3:
        return {"absent": f"a trend needs three models that were not aligned, and there are {len(trend)}"}
    x, y = (np.array([points[name][axis] for name in trend]) for axis in (0, 1))
    spread = ((x - x.mean()) ** 2).sum()
    if spread < 1e-12:
        return {"absent": "the models that were not aligned all have the same global recall"}
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    start = float(y.mean() - slope * x.mean())
    residuals = {name: local - (start + slope * across) for name, (across, local) in points.items()}
    return {"slope": slope, "intercept": start, "trend": list(trend), "residuals": residuals}


def interventions(result: ProbeResult) -> dict[str, dict[str, str]]:
    """Heads that were also trained under an intervention: {"local/transformer": {"none": key, "prefix": key, ...}}."""
    found: dict[str, dict[str, str]] = {}
    for one in result.heads:
        found.setdefault(f"{one.task}/{one.head}", {})[one.intervention] = one.key
    return {name: keys for name, keys in found.items() if len(keys) > 1 and "none" in keys}


def headline(keys: Sequence[str], task: str = "local") -> str | None:
    """The head that a task is judged by: the transformer, as in the paper, or else the first without intervention."""
    plain = [key for key in keys if key.startswith(task + "/") and key.count("/") == 1]
    return f"{task}/transformer" if f"{task}/transformer" in plain else next(iter(plain), None)
