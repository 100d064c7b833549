"""Retrieval: ranks are those of a brute-force search, a tie counts against, and intervals are over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locfast.eval.global_ability.intervals import bootstrap, interval
from locfast.eval.global_ability.retrieval import ranks, retrieval_scores

IMAGE_OF = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5, 6, 6])  # one to four captions an image, 7 images


def embeddings(seed: int = 0, images: int = 7, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, width, generator=generator)
    of = IMAGE_OF if images == 7 else torch.arange(images)
    return x, x[of] + 1.5 * torch.randn(len(of), width, generator=generator)


def brute_force(x: Tensor, texts: Tensor, k: int) -> tuple[list[bool], list[bool]]:
    """Whether each image finds one of its captions among the k nearest, and each caption its image: by sorting."""
    cosine = F.normalize(x, dim=-1) @ F.normalize(texts, dim=-1).T
    to_text = [bool((IMAGE_OF[row.argsort(descending=True)[:k]] == i).any()) for i, row in enumerate(cosine)]
    to_image = [IMAGE_OF[j].item() in row.argsort(descending=True)[:k].tolist() for j, row in enumerate(cosine.T)]
    return to_text, to_image


@pytest.mark.parametrize("block", [1, 20, 14 * 3, 1 << 24])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_those_of_a_brute_force_search(seed, block):
    x, texts = embeddings(seed)
    everyone = torch.arange(7)
    to_text = ranks(x, texts, everyone, IMAGE_OF, block=block)
    to_image = ranks(texts, x, IMAGE_OF, everyone, block=block)
    for k in range(1, 8):
        # before an image's nearest caption stand wrong ones only, so its rank is a place among all captions
        assert ((to_text < k).tolist(), (to_image < k).tolist()) == brute_force(x, texts, k)
    assert 0 < (to_image > 0).sum() < len(to_image)  # neither all found nor all missed


def test_recall_is_the_share_of_images_and_of_captions_that_are_found():
    x, texts = embeddings(5)
    found = {one.setting: one for one in retrieval_scores({"a": x}, {"a": texts}, IMAGE_OF, {}, ks=(1, 2, 3, 5))}
    for k in (1, 2, 3, 5):
        to_text, to_image = brute_force(x, texts, k)
        assert found[f"image to text, R@{k}"].accuracy == pytest.approx(np.mean(to_text))
        assert found[f"text to image, R@{k}"].accuracy == pytest.approx(np.mean(to_image))


def test_a_tie_counts_against():
    same = torch.ones(7, 8)
    everyone = torch.arange(7)
    assert ranks(same, same[IMAGE_OF], everyone, IMAGE_OF).tolist() == (14 - torch.bincount(IMAGE_OF)).tolist()
    assert ranks(same[IMAGE_OF], same, IMAGE_OF, everyone).tolist() == [6] * 14
    twice = torch.eye(4)[[0, 1, 2, 2]]  # two images that are alike, each with its caption
    assert ranks(twice, torch.eye(4)[[0, 1, 2, 2]], torch.arange(4), torch.arange(4)).tolist() == [0, 0, 1, 1]


def test_an_images_own_captions_do_not_stand_in_each_others_way():
    x = torch.eye(3)
    texts = torch.cat([x[0:1]] * 12 + [x[1:2], x[2:3]])
    image_of = torch.tensor([0] * 12 + [1, 2])
    assert ranks(x, texts, torch.arange(3), image_of).tolist() == [0, 0, 0]


def test_length_of_embeddings_does_not_matter():
    x, texts = embeddings(1)
    long = ranks(x * torch.rand(7, 1) * 9, texts * 3, torch.arange(7), IMAGE_OF)
    assert torch.equal(long, ranks(x, texts, torch.arange(7), IMAGE_OF))


def test_scores_are_set_against_the_other_model():
    (x, texts), (y, others) = embeddings(0), embeddings(1)
    found = retrieval_scores({"old": x, "new": y}, {"old": texts, "new": others}, IMAGE_OF, {"new": "old"})
    assert [one.setting for one in found[::2]] == [
        f"{way}, R@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10)
    ]
    for old, new in zip(found[::2], found[1::2], strict=True):
        assert old.difference is None and new.difference.against == "old"
        assert new.difference.accuracy == pytest.approx(new.accuracy - old.accuracy)
        assert new.mean_per_class is None and new.per_class == {}
    assert found[0].accuracy <= found[2].accuracy <= found[4].accuracy == 1.0  # 7 images: R@10 finds all


def test_intervals_resample_images_with_all_of_their_captions():
    """100 images of 5 captions that are all found or all missed: as wide as for 100 questions, not for 500."""
    right = torch.arange(100) < 50
    of = torch.full((100,), 5)
    clustered = bootstrap({"a": right * 5}, of=of)["a"]
    assert np.array_equal(clustered, bootstrap({"a": right})["a"])
    low, high = interval(clustered)
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.015)  # 1.96 * sqrt(0.25 / 100) = 0.098
    uneven = torch.tensor([1, 9] * 50)
    share = bootstrap({"a": torch.tensor([1, 0] * 50)}, of=uneven)["a"]
    assert share.mean() == pytest.approx(0.1, abs=0.005)  # 50 of 500 questions


def test_intervals_do_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    of = torch.randint(1, 9, (300,), generator=generator)
    right = {name: (of * torch.rand(300, generator=generator)).long() for name in "ab"}
    whole = bootstrap(right, of=of)
    monkeypatch.setattr("locfast.eval.global_ability.intervals.DRAWN", 7000)
    for name, values in bootstrap(right, of=of).items():
        assert np.array_equal(values, whole[name])


def test_nothing_of_the_size_of_the_full_matrix_is_made():
    """1,500 images and captions: 2.25e6 cosines, of which at most 30,000 lie there at a time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest.append(out.numel())
            return out

    x, texts = embeddings(0, images=1500)
    everyone = torch.arange(1500)
    with Watch():
        ranks(x, texts, everyone, everyone, block=30_000)
    assert 20_000 < max(largest) <= 30_000
