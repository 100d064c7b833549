"""Macro-averaged recall, the probe's measure (Locality Alignment, appendix A)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How well sets of classes were told, at the threshold sigmoid > 0.5."""

    recall: float
    """Mean over the classes with at least one positive. What the paper reports."""
    precision: float
    """Mean over the classes with at least one positive; a class that is never predicted counts as 0."""
    class_recall: tuple[float | None, ...]
    """By class; None where the data hold no positive."""


def macro_scores(logits: Tensor, targets: Tensor) -> Scores:
    """Scores pooled over all patches (or images) of an evaluation set: logits, targets (bool), both [..., K]."""
    guess, truth = logits.flatten(0, -2) > 0, targets.flatten(0, -2).bool()
    hits = (guess & truth).sum(0).double()
    positives, guesses = truth.sum(0), guess.sum(0)
    there = positives > 0
    if not bool(there.any()):
        raise ValueError("no class has a positive: nothing to measure recall on")
    recall, precision = hits / positives, hits / guesses.clamp(min=1)
    return Scores(
        recall=recall[there].mean().item(),
        precision=precision[there].mean().item(),
        class_recall=tuple(r if ok else None for r, ok in zip(recall.tolist(), there.tolist(), strict=True)),
    )
