"""Recall, precision, F1 and average precision equal hand-worked cases and an independent library."""

import numpy as np
import pytest
import torch

from locfast.eval.probing.results import Counts
from locfast.eval.probing.scoring import average_precision, score, summarise


def test_scores_of_a_case_worked_by_hand():
    """Two images of two patches, three classes; the third one is nowhere."""
    truth = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[0, 1, 0], [0, 0, 0]]]).bool()
    logits = torch.tensor([[[2.0, 1, -1], [-1, 3, -1]], [[1, 2, 5], [-3, -2, -1]]])
    found = score(logits, truth)
    assert found.classes["recall"] == [0.5, 1.0, None]
    assert found.classes["precision"] == [0.5, 2 / 3, None]
    assert found.classes["f1"] == [0.5, 0.8, None]
    # Class 0 by score: 2 (right), 1 (wrong), -1 (right), -3: 1/2 * 1 + 1/2 * 2/3. Class 1: 3, 2 right, then 1 and -2.
    assert found.classes["ap"] == pytest.approx([5 / 6, 1.0, None])
    assert found.macro == pytest.approx({"recall": 0.75, "precision": 7 / 12, "f1": 0.65, "ap": 11 / 12})
    assert found.counts.hits.tolist() == [[1, 1, 0], [0, 1, 0]]
    assert found.counts.told.tolist() == [[1, 2, 0], [1, 1, 1]]
    assert found.counts.there.tolist() == [[2, 1, 0], [0, 1, 0]]


def test_scores_equal_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(40, 9, 6, generator=generator) < torch.linspace(0.02, 0.5, 6)
    logits = (torch.randn(40, 9, 6, generator=generator) + truth).mul(4).round() / 4 - 0.5  # with many equal scores
    found = score(logits, truth)
    y, scores = truth.flatten(0, 1).numpy(), logits.flatten(0, 1).numpy()
    for name, theirs in (
        ("recall", metrics.recall_score(y, scores > 0, average=None, zero_division=0)),
        ("precision", metrics.precision_score(y, scores > 0, average=None, zero_division=0)),
        ("f1", metrics.f1_score(y, scores > 0, average=None, zero_division=0)),
        ("ap", metrics.average_precision_score(y, scores, average=None)),
    ):
        np.testing.assert_allclose(found.classes[name], theirs, rtol=1e-12)
        assert found.macro[name] == pytest.approx(theirs.mean(), rel=1e-12)


def test_patches_without_a_label_count_nowhere():
    truth = torch.tensor([[[1, 0], [0, 0]]]).bool()
    ranks = torch.tensor([[[1.0, -1], [9, 9]]])
    found = score(ranks, truth, counted=truth.any(-1))
    assert found.classes == {"recall": [1.0, None], "precision": [1.0, None], "f1": [1.0, None], "ap": [1.0, None]}


def test_average_precision_is_the_same_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    scores, truth = torch.randn(50, 7, generator=generator), torch.rand(50, 7, generator=generator) < 0.3
    whole = average_precision(scores, truth)
    monkeypatch.setattr("locfast.eval.probing.scoring.MOST", 100)
    assert torch.equal(average_precision(scores, truth), whole)


def test_average_precision_of_equal_scores_is_the_share_of_positives():
    truth = torch.tensor([[1], [0], [0], [1], [0]]).bool()
    assert average_precision(torch.zeros(5, 1), truth).item() == pytest.approx(0.4)


def test_scores_without_a_positive_anywhere_are_refused():
    nothing = np.zeros((3, 2), np.int32)
    with pytest.raises(ValueError, match="no class is anywhere"):
        summarise(Counts(nothing, nothing, nothing), [0.0, 0.0])
