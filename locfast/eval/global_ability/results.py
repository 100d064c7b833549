"""Scores of several models on the same validation images, what they differ by, and the file that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.eval.global_ability.intervals import Interval, bootstrap, interval

SCHEMA = 1
FILE = "evaluate.json"


@dataclass(frozen=True)
class Difference:
    """Of a model from the one it is set against, on the same images; shares of 1."""

    against: str
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Score:
    """One model under one setting. Accuracies are shares of 1; intervals are of 95 %."""

    setting: str
    """For example k = 20."""
    model: str
    accuracy: float
    interval: Interval
    mean_per_class: float | None
    """None where there are no classes."""
    per_class: dict[str, float]
    difference: Difference | None
    details: dict[str, Any] = field(default_factory=dict)
    """What was chosen on the way, a penalty for example."""


def scores(
    setting: str,
    predictions: Mapping[str, Tensor],
    labels: Tensor,
    classes: Sequence[str],
    against: Mapping[str, str],
    *,
    seed: int = 0,
    details: Mapping[str, dict[str, Any]] | None = None,
) -> list[Score]:
    """One score a model, in the order of `predictions` ({model: [M] int64}).

    labels [M] int64, every class among them. against: {model: the model whose score is taken from its own}.
    """
    right = {name: predicted == labels for name, predicted in predictions.items()}
    counts = torch.bincount(labels, minlength=len(classes)).double()
    per_class = {}
    for name, one in right.items():
        by_class = torch.bincount(labels[one], minlength=len(classes)) / counts
        per_class[name] = dict(zip(classes, by_class.tolist(), strict=True))
    return compare(setting, right, against, per_class=per_class, seed=seed, details=details)


def compare(
    setting: str,
    right: Mapping[str, Tensor],
    against: Mapping[str, str],
    *,
    of: Tensor | None = None,
    per_class: Mapping[str, dict[str, float]] | None = None,
    seed: int = 0,
    details: Mapping[str, dict[str, Any]] | None = None,
) -> list[Score]:
    """One score a model of what it got right, as `bootstrap` takes it; intervals are over images."""
    drawn = bootstrap(right, seed, of=of)
    total = len(next(iter(right.values()))) if of is None else int(of.sum())
    accuracy = {name: int(one.sum()) / total for name, one in right.items()}
    return resampled(setting, accuracy, drawn, against, per_class=per_class, details=details)


def resampled(
    setting: str,
    accuracy: Mapping[str, float],
    drawn: Mapping[str, np.ndarray],
    against: Mapping[str, str],
    *,
    per_class: Mapping[str, dict[str, float]] | None = None,
    details: Mapping[str, dict[str, Any]] | None = None,
) -> list[Score]:
    """One score a model from what it reaches and what it reaches on resampled images, {model: [draws]}."""
    told = []
    for name in accuracy:
        difference = None
        if other := against.get(name):
            spread = interval(drawn[name] - drawn[other])
            difference = Difference(other, accuracy[name] - accuracy[other], spread)
        by_class = (per_class or {}).get(name, {})
        told.append(
            Score(
                setting=setting,
                model=name,
                accuracy=accuracy[name],
                interval=interval(drawn[name]),
                mean_per_class=_mean(by_class.values()) if by_class else None,
                per_class=by_class,
                difference=difference,
                details=dict((details or {}).get(name, {})),
            )
        )
    return told


def _mean(values: Iterable[float]) -> float:
    return torch.tensor(list(values), dtype=torch.double).mean().item()


def check_out(out: Path, overwrite: bool, file: str = FILE, kind: str = "an evaluation") -> None:
    """Make the folder of the results, whose mark is `file`: what `kind` of command leaves there.

    Raises UserError where the folder holds anything and may not be overwritten.
    """
    try:
        there = sorted(os.listdir(out)) if out.exists() else []
        if there and not overwrite:
            raise UserError(f"--out {out}: it is there already and holds {there[0]}. Add --overwrite, or give another.")
        if there and file not in there:
            raise UserError(
                f"--out {out} --overwrite: the folder holds no {file} but {there[0]}, so it is not of {kind}. "
                "Give another --out."
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: this folder cannot be made or read ({error.strerror}). Give a folder that you may write to."
        ) from None


def write_results(out: Path, evaluation: str, found: Sequence[Score], told: Mapping[str, Any]) -> Path:
    """OUT/evaluate.json, whole or not at all: what was evaluated and how (`told`), then every score."""
    values = {"schema": SCHEMA, "evaluation": evaluation, **told, "scores": [asdict(one) for one in found]}
    aside = out / f".{FILE}"
    aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, out / FILE)
    return out / FILE
