"""Colour policies: torchvision's and PIL's own changes of pixels, drawn from keyed numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import ColorJitter as TheirJitter

from locfast.data.augment import Augment
from locfast.data.augment.color_jitter import ORDERS, ColorJitter
from locfast.data.augment.three_augment import ThreeAugment
from locfast.data.spec import View
from locfast.errors import UserError
from locfast.random import Keys, random_words

VIEW = View((32, 32), (0.5,) * 3, (0.5,) * 3)
LUT = "jitter-0.4-0.4-0.2-0.1+three"


def word(share: float) -> int:
    return int(share * 2**32)


def made(color: str, image: Image.Image, index: int = 0, stream: str = "color.image") -> np.ndarray:
    return Augment(replace(VIEW, color=color))(np.asarray(image), Keys.of(0, 0, index), stream)


@pytest.mark.parametrize("order", [0, 5, 17, 23])
def test_jitter_is_torchvisions_for_the_same_numbers(picture, monkeypatch, order):
    image, shares = picture(), (0.1, 0.9, 0.6, 0.2)
    words = [word(0.79), word((order + 0.5) / 24), *map(word, shares)]
    ours = ColorJitter("jitter-0.4-0.3-0.2-0.1", VIEW)(image, words)
    factors = (0.6 + 0.8 * 0.1, 0.7 + 0.6 * 0.9, 0.8 + 0.4 * 0.6, -0.1 + 0.2 * 0.2)
    theirs = TheirJitter(0.4, 0.3, 0.2, 0.1)
    monkeypatch.setattr(theirs, "get_params", lambda *_: (torch.tensor(ORDERS[order]), *factors))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs(image)))
    assert not np.array_equal(np.asarray(ours), np.asarray(image))


def test_jitter_happens_as_often_as_its_text_says(picture):
    image = picture()
    rows = random_words(Keys(0, torch.zeros(2000).long(), torch.arange(2000)), "x", 6).tolist()
    for text, share in (("jitter-0.4-0.4-0.2-0.1", 0.8), ("jitter-0.4-0.4-0.2-0.1-p0.25", 0.25)):
        policy = ColorJitter(text, VIEW)
        changed = [policy(image, words) is not image for words in rows[:1000]]
        assert np.mean(changed) == pytest.approx(share, abs=0.04)  # three standard deviations of a share of 1000
    assert {words[1] * 24 >> 32 for words in rows} == set(range(24))


def test_a_strength_of_nothing_changes_nothing(picture):
    image = picture()
    assert np.array_equal(made("jitter-0-0-0-0-p1", image), np.asarray(image))


def test_factors_do_not_fall_below_zero(picture):
    """As torchvision's: a strength of 2 is a factor in 0 .. 3, and the darkest is black."""
    black = ColorJitter("jitter-2-0-0-0-p1", VIEW)(picture(), [0, 0, 0, 0, 0, 0])
    assert not np.asarray(black).any()


def test_three_augment_does_exactly_one_of_three_always(picture):
    image = picture()
    grey = np.asarray(ImageOps.grayscale(image).convert("RGB"))
    solar = np.asarray(ImageOps.solarize(image))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * 0.5)))
    policy = ThreeAugment("three", VIEW)
    for share, expected in ((0.1, grey), (0.5, solar), (0.9, blurred)):
        assert np.array_equal(np.asarray(policy(image, [word(share), word(0.5)])), expected)
    words = random_words(Keys(0, torch.zeros(3000).long(), torch.arange(3000)), "x", 2)
    counts = torch.bincount(words[:, 0] * 3 >> 32, minlength=4)
    assert (counts[:3] - 1000).abs().max() < 80 and counts[3] == 0  # three standard deviations of a count


def test_parts_come_one_after_the_other_and_draw_independently(picture):
    image = picture()
    jittered = made("jitter-0.4-0.4-0.2-0.1-p1", image, index=3)
    then = made("three", Image.fromarray(jittered), index=3, stream="color.image.1")
    assert np.array_equal(made("jitter-0.4-0.4-0.2-0.1-p1+three", image, index=3), then)
    both = {made("three+three", image, index=i).tobytes() for i in range(60)}
    assert len(both) > 6  # pairs of kinds, not only each kind twice


def test_another_sample_or_view_is_coloured_otherwise(picture):
    image = picture()
    first = made(LUT, image)
    assert np.array_equal(first, made(LUT, image))
    assert not np.array_equal(first, made(LUT, image, index=1))
    assert not np.array_equal(first, made(LUT, image, stream="color.second"))


@pytest.mark.parametrize(
    ("color", "told"),
    [
        ("jitter-0.4-0.4-0.2", "four numbers"),
        ("jitter-0.4-0.4-0.2-0.1-0.8", "four numbers"),
        ("jitter-0.4-0.4-0.2-0.6", "hue turns by at most 0.5, got 0.6"),
        ("jitter-0.4-0.4-0.2-0.1-p8", "probability is at most 1, got 8"),
        ("three-0.5", "three takes no numbers"),
        ("three+", "begins with none of rand, jitter, three"),
        ("grey", "whose part 'grey' is none"),
        ("rand-q9", "rand-m9-mstd0.5-inc1"),
    ],
)
def test_a_string_that_is_no_policy_is_a_mistake_of_the_user(color, told):
    with pytest.raises(UserError, match=told):
        Augment(replace(VIEW, color=color))
