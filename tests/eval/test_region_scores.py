"""mAcc, recall among duplicates and their intervals, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locfast.eval.global_ability.intervals import bootstrap_per_class, interval
from locfast.eval.global_ability.table import tables_by_group
from locfast.eval.regions.scores import recognise, recognition_scores, region_retrieval_scores

CLASSES = ["ash", "elm", "fir", "oak", "yew"]
LABELS = torch.tensor([0, 0, 0, 1, 3, 3, 1, 0, 4, 0, 1, 4])  # nothing is a fir
IMAGE_OF = torch.tensor([0, 0, 2, 2, 2, 3, 5, 5, 5, 5, 6, 7])  # images 1 and 4 have no region


def some(seed: int, rows: int, width: int = 6) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1, 17, 1 << 24])
def test_a_region_takes_the_class_of_the_largest_cosine(block: int) -> None:
    regions, names = some(0, 12) * torch.arange(1, 13)[:, None], some(1, 5) * torch.tensor([[9.0], [1], [1], [4], [1]])
    expected = []
    for region in regions:
        cosines = [float(region @ name / (region.norm() * name.norm())) for name in names]
        expected.append(cosines.index(max(cosines)))
    assert recognise(regions, names, block=block).tolist() == expected
    assert len(set(expected)) > 2


def macc(right: list[bool], rows: list[int]) -> float:
    """By counting: the mean over classes that occur of the share that is right."""
    shares = []
    for label in range(len(CLASSES)):
        own = [right[row] for row in rows if LABELS[row] == label]
        if own:
            shares.append(sum(own) / len(own))
    return sum(shares) / len(shares)


def test_mean_class_accuracy_leaves_out_classes_without_a_region() -> None:
    predicted = {"a": recognise(some(0, 12), some(1, 5)), "b": recognise(some(2, 12), some(3, 5))}
    found = recognition_scores(predicted, LABELS, IMAGE_OF, CLASSES, {"b": "a"})
    assert [(one.setting, one.model) for one in found] == [
        (f"region recognition, {what}", name) for what in ("mAcc", "accuracy") for name in "ab"
    ]
    for mean, overall in ((found[0], found[2]), (found[1], found[3])):
        right = (predicted[mean.model] == LABELS).tolist()
        assert mean.accuracy == mean.mean_per_class == pytest.approx(macc(right, list(range(12))))
        assert overall.accuracy == pytest.approx(sum(right) / 12)
        assert set(mean.per_class) == set(CLASSES) - {"fir"}
        assert mean.accuracy != pytest.approx(overall.accuracy)
    assert found[1].difference is not None and found[1].difference.against == "a"
    assert found[1].difference.accuracy == pytest.approx(found[1].accuracy - found[0].accuracy)


def test_intervals_of_the_mean_resample_images_with_all_of_their_regions() -> None:
    """Every draw is a mean that a loop over some resample of the images gives, and they spread as a loop's do."""
    right = {"a": LABELS % 2 == 0, "b": torch.arange(12) % 3 > 0}
    drawn = bootstrap_per_class(right, LABELS, IMAGE_OF, seed=1, draws=4000)
    images = IMAGE_OF.unique().tolist()
    random, by_hand = np.random.default_rng(5), {"a": [], "b": []}
    for _ in range(4000):
        rows = [r for i in random.choice(images, len(images)) for r in (i == IMAGE_OF).nonzero()[:, 0].tolist()]
        for name, own in right.items():
            by_hand[name].append(macc(own.tolist(), rows))
    for name in "ab":
        # 4000 draws of a deviation of 0.2: means within 5 standard errors of the difference, 0.2 * sqrt(2 / 4000)
        assert abs(drawn[name].mean() - np.mean(by_hand[name])) < 5 * 0.2 * (2 / 4000) ** 0.5
        assert drawn[name].std() == pytest.approx(np.std(by_hand[name]), rel=0.06)
        assert interval(drawn[name]) == pytest.approx(interval(np.array(by_hand[name])), abs=0.05)
    paired = (drawn["a"] - drawn["b"]).std()
    assert paired == pytest.approx(np.std(np.array(by_hand["a"]) - np.array(by_hand["b"])), rel=0.06)
    assert bootstrap_per_class(right, LABELS, IMAGE_OF, seed=1, draws=4000)["a"].tolist() == drawn["a"].tolist()


PHRASES = torch.tensor([0, 1, 0, 2, 3, 3, 1, 0, 4, 5, 0, 2])


def test_recall_counts_every_region_of_an_equal_phrase_and_a_phrase_once() -> None:
    regions, phrases = {"a": some(4, 12), "b": some(5, 12)}, {"a": some(6, 6), "b": some(7, 6)}
    found = region_retrieval_scores(regions, phrases, PHRASES, IMAGE_OF, {"b": "a"}, ks=(1, 2, 4))
    of = {(one.setting, one.model): one for one in found}
    for name in "ab":
        cosine = F.normalize(regions[name], dim=-1) @ F.normalize(phrases[name], dim=-1).T
        for k in (1, 2, 4):
            to_phrase = [int(PHRASES[r]) in cosine[r].argsort(descending=True)[:k].tolist() for r in range(12)]
            to_region = []
            for asks in PHRASES.tolist():  # every region asks with its phrase
                best = cosine[:, asks].argsort(descending=True)[:k].tolist()
                to_region.append(any(int(PHRASES[r]) == asks for r in best))
            one = of[f"region to phrase, R@{k}", name]
            assert one.accuracy == pytest.approx(np.mean(to_phrase))
            assert one.interval[0] <= one.accuracy <= one.interval[1]
            assert of[f"phrase to region, R@{k}", name].accuracy == pytest.approx(np.mean(to_region))
    assert 0 < of["region to phrase, R@2", "a"].accuracy < 1
    assert all((one.difference is None) == (one.model == "a") for one in found)


def test_tables_stand_by_group_with_models_below_one_another() -> None:
    predicted = {"a": LABELS.clone(), "b": torch.zeros_like(LABELS)}
    scores = recognition_scores(predicted, LABELS, IMAGE_OF, CLASSES, {"b": "a"})
    scores += region_retrieval_scores({"a": some(4, 12)}, {"a": some(6, 6)}, PHRASES, IMAGE_OF, {})
    tables = tables_by_group(scores)
    heads = [[column.header for column in table.columns] for table in tables]
    ks = ["R@1", "R@5", "R@10"]
    assert heads == [["region recognition", "mAcc", "accuracy"], ["region to phrase", *ks], ["phrase to region", *ks]]
    first, mean = (list(column.cells) for column in tables[0].columns[:2])
    assert first == ["a", "b", "  difference from a"]
    assert [cell.splitlines()[0] for cell in mean] == ["100.0", "25.0", "-75.0"]
