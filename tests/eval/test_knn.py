"""kNN finds what a slow loop finds, whatever the chunks, and its intervals are those of a bootstrap over images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.eval.global_ability import knn
from locfast.eval.global_ability.intervals import bootstrap, interval
from locfast.eval.global_ability.results import scores


def clusters(count: int, classes: int = 4, width: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, width, generator=generator), labels


def by_loop(train: Tensor, labels: Tensor, query: Tensor, classes: int, k: int) -> int:
    """Plain Python: sort all training images by cosine, let the first k vote."""
    norm = math.hypot(*query.tolist())
    cosines = [
        (sum(a * b for a, b in zip(row, query.tolist(), strict=True)) / (math.hypot(*row) * norm), -i)
        for i, row in enumerate(train.tolist())
    ]
    votes = [0.0] * classes
    for cosine, index in sorted(cosines, reverse=True)[:k]:
        votes[int(labels[-index])] += math.exp(cosine / 0.07)
    return votes.index(max(votes))


def test_predictions_equal_a_slow_loops() -> None:
    train, labels = clusters(90)
    queries, _ = clusters(25, seed=1)
    found = knn.knn_predict(train, labels, queries, 4, (1, 7, 90))
    for k, predicted in found.items():
        assert predicted.tolist() == [by_loop(train, labels, query, 4, k) for query in queries]


def test_predictions_equal_scikit_learns() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, labels = clusters(300)
    queries, _ = clusters(100, seed=1)
    found = knn.knn_predict(train, labels, queries, 4, (1, 5, 50))
    for k, predicted in found.items():
        judge = neighbors.KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        assert predicted.tolist() == judge.fit(train.double(), labels).predict(queries.double()).tolist()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = clusters(230)
    queries, _ = clusters(61, seed=1)
    whole = knn.neighbours(train, queries, 20)
    voted = knn.knn_predict(train, labels, queries, 4, (3, 20))
    monkeypatch.setattr(knn, "TRAIN_CHUNK", 16)  # fewer than k: a chunk alone cannot fill the list
    monkeypatch.setattr(knn, "QUERY_CHUNK", 7)
    monkeypatch.setattr(knn, "VOTES", 1)
    pieces = knn.neighbours(train, queries, 20)
    assert torch.equal(whole[1], pieces[1])
    # a product of other shapes adds 12 terms in another order: a few units in the last place of a cosine
    torch.testing.assert_close(whole[0], pieces[0], rtol=0, atol=1e-6)
    again = knn.knn_predict(train, labels, queries, 4, (3, 20))
    assert all(torch.equal(voted[k], again[k]) for k in voted)


def test_of_equally_similar_images_the_first_count() -> None:
    """Exact cosines: 1 for ten copies, 0 and -1 for the others, so that only the rule for ties decides."""
    axes = torch.eye(4)
    train = torch.cat([-axes[:1].repeat(3, 1), axes[:1].repeat(10, 1), axes[1:2].repeat(5, 1)])
    similarity, index = knn.neighbours(train, 2 * axes[:1], 18)
    assert index[0].tolist() == [*range(3, 13), *range(13, 18), *range(3)]
    assert similarity[0].tolist() == [1.0] * 10 + [0.0] * 5 + [-1.0] * 3
    labels = torch.tensor([2] * 3 + [1, 0] * 5 + [2] * 5)
    predicted = knn.knn_predict(train, labels, axes[:1], 3, (1, 2, 3))
    assert {k: one.item() for k, one in predicted.items()} == {1: 1, 2: 0, 3: 1}  # a draw at 2: the first class


@pytest.mark.parametrize("k", [0, 31])
def test_more_neighbours_than_training_images_are_refused(k: int) -> None:
    train, labels = clusters(30)
    with pytest.raises(UserError, match=rf"--k {k}.*1 to 30.*Type --k 10 20"):
        knn.knn_predict(train, labels, train, 4, (5, k))


def test_intervals_of_two_images_are_worked_by_hand() -> None:
    """One right and one wrong: a resample holds 0, 1 or 2 right ones with 1/4, 1/2, 1/4; of equals all resamples."""
    half, all_right = torch.tensor([True, False]), torch.tensor([True, True])
    drawn = bootstrap({"half": half, "all": all_right, "same": half})
    assert interval(drawn["half"]) == (0.0, 1.0) and interval(drawn["all"]) == (1.0, 1.0)
    shares = [(drawn["half"] == value).mean() for value in (0, 0.5, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=4 * math.sqrt(0.25 / 10_000))  # four standard errors
    assert interval(drawn["half"] - drawn["same"]) == (0.0, 0.0)  # paired: the same images for both


def test_paired_intervals_equal_a_bootstrap_image_by_image() -> None:
    """Resampled accuracies and differences have the spread that drawing single images gives."""
    rng = np.random.default_rng(1)
    a = rng.random(200) < 0.7
    b = np.where(rng.random(200) < 0.8, a, ~a)
    drawn = bootstrap({"a": torch.from_numpy(a), "b": torch.from_numpy(b)})
    rows = rng.integers(0, 200, (10_000, 200))
    difference = a[rows].mean(1) - b[rows].mean(1)
    expected = interval(difference)
    # a quantile of 10,000 draws is off by 0.0027 / density of about 3 per standard deviation, and steps are 1/200
    assert interval(drawn["a"] - drawn["b"]) == pytest.approx(expected, abs=0.006)
    assert np.std(drawn["a"] - drawn["b"]) == pytest.approx(np.std(difference), rel=0.04)


def test_scores_are_worked_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    found = scores("k = 1", {"old": torch.tensor([0, 0, 0, 0]), "new": torch.tensor([0, 1, 1, 1])}, labels, "ab",
                   {"new": "old"})  # fmt: skip
    old, new = found
    assert (old.accuracy, old.mean_per_class, old.per_class) == (0.75, 0.5, {"a": 1.0, "b": 0.0})
    assert new.accuracy == 0.5 and new.per_class == pytest.approx({"a": 1 / 3, "b": 1.0})
    assert old.difference is None and new.difference is not None
    assert new.difference.against == "old" and new.difference.accuracy == -0.25
    low, high = new.difference.interval
    assert low == -1.0 and high > 0  # two of four lost, one gained: all of a resample may be lost ones
