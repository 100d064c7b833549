"""From a detector's boxes to regions in pixels of the image."""

from __future__ import annotations

import pytest
import torch

from locfast.vesl.boxes import regions


def found(boxes, scores, labels=None, size=(100, 200), padded=True, **choice):
    labels = torch.zeros(len(scores), dtype=torch.int64) if labels is None else torch.tensor(labels)
    phrases = ["a dog", "a cat"]
    return regions(torch.tensor(scores), labels, torch.tensor(boxes), phrases, size, padded=padded, **choice)


def test_a_box_of_a_padded_frame_is_in_pixels_of_the_longer_side() -> None:
    """Height 100, width 200, padded to 200 x 200: the frame's middle is at the image's lower edge."""
    (region,), degenerate = found([[0.25, 0.25, 0.5, 0.5]], [0.9])
    assert region.box == (0, 0, 100, 100) and region.text == "a dog" and region.score == 0.9 and degenerate == 0


def test_a_box_of_a_squashed_frame_is_scaled_by_both_sides() -> None:
    (region,), _ = found([[0.5, 0.5, 0.5, 0.5]], [0.9], padded=False)
    assert region.box == (50, 25, 150, 75)


def test_boxes_are_clipped_and_those_in_the_padding_are_degenerate() -> None:
    kept, degenerate = found([[0.5, 0.5, 2.0, 2.0], [0.5, 0.9, 0.2, 0.1], [0.5, 0.2, 0.001, 0.1]], [0.9, 0.8, 0.7])
    assert [region.box for region in kept] == [(0, 0, 200, 100)] and degenerate == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_boxes_that_are_not_finite_are_degenerate(bad: float) -> None:
    assert found([[0.5, 0.2, bad, 0.1]], [0.9]) == ((), 1)


def test_a_score_must_be_above_the_least_and_a_nan_is_not() -> None:
    box = [0.2, 0.2, 0.2, 0.2]
    kept, degenerate = found([box] * 4, [0.5, 0.25, float("nan"), 0.26], min_score=0.25)
    assert [region.score for region in kept] == [0.5, 0.26] and degenerate == 0


def test_the_surest_come_first_and_equal_ones_in_the_detectors_order() -> None:
    boxes = [[0.1 * i + 0.1, 0.2, 0.1, 0.1] for i in range(4)]
    kept, _ = found(boxes, [0.3, 0.9, 0.3, 0.5])
    assert [region.box[0] for region in kept] == [30, 70, 10, 50]
    assert [region.score for region in found(boxes, [0.3, 0.9, 0.3, 0.5], max_regions=2)[0]] == [0.9, 0.5]


def test_nms_is_off_unless_asked_for_and_leaves_other_phrases_alone() -> None:
    boxes = [[0.2, 0.2, 0.2, 0.2], [0.21, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]]
    scores, labels = [0.6, 0.9, 0.5], [0, 0, 1]
    assert len(found(boxes, scores, labels)[0]) == 3
    assert [(r.text, r.score) for r in found(boxes, scores, labels, nms=0.5)[0]] == [("a dog", 0.9), ("a cat", 0.5)]
