"""The probe's measure and its labels, by hand."""

import pytest
import torch

from locfast.eval.labels import classes_in_image, classes_in_patches
from locfast.eval.metrics import macro_scores


def test_macro_recall_by_hand():
    targets = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)
    # class 0: hits 1 of 3 positives, 1 of 2 guesses right; class 1: 2 of 2, of 3 guesses; class 2: no positives
    logits = torch.tensor([[2.0, 1.0, -1], [-1, 0.1, -1], [0.0, -1, 9], [3, 5, -1]])
    scores = macro_scores(logits, targets)
    assert scores.recall == pytest.approx((1 / 3 + 1) / 2)
    assert scores.precision == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores.class_recall == (pytest.approx(1 / 3), 1.0, None)


def test_macro_recall_pools_over_patches_of_all_images():
    targets = torch.zeros(2, 3, 1, dtype=torch.bool)
    targets[0, :, 0] = True
    targets[1, 0, 0] = True
    logits = torch.full((2, 3, 1), -1.0)
    logits[1, 0, 0] = 1.0
    assert macro_scores(logits, targets).recall == 0.25  # not the mean over images, 0.5


def test_half_is_no_yes():
    assert macro_scores(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)).recall == 0.0


def test_no_positives_at_all_is_refused():
    with pytest.raises(ValueError, match="no class"):
        macro_scores(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))


def test_labels_are_the_union_in_a_patch_without_unlabeled_beside_others():
    label = torch.zeros(1, 4, 6, dtype=torch.uint8)
    label[0, 0, 0] = 2  # patch 0: unlabeled and 2
    label[0, 2:, 2:4] = torch.tensor([[1, 2], [1, 255]])  # patch 4: 1 and 2
    label[0, :2, 4:] = 255  # patch 2: nothing known
    present = classes_in_patches(label, (2, 2), 3)
    assert [torch.nonzero(p).flatten().tolist() for p in present[0]] == [[2], [0], [], [0], [1, 2], [0]]
    kept = classes_in_patches(label, (2, 2), 3, unlabeled=None)
    assert torch.nonzero(kept[0, 0]).flatten().tolist() == [0, 2]


def test_unlabeled_stays_in_an_images_union():
    label = torch.tensor([[[0, 2], [2, 2]], [[1, 1], [1, 255]]], dtype=torch.uint8)
    assert classes_in_image(label, 3).tolist() == [[True, False, True], [False, True, False]]
