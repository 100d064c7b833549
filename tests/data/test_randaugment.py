"""RandAugment: every draw gives an image, and timm's own where timm gives one."""

import random

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import posterize

from locfast.data.augment.randaugment import RandAugment, _posterize
from locfast.data.spec import View

VIEW = View((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), color="rand-m9-mstd0.5-inc1")


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_posterising_to_no_bit_gives_black_and_to_others_what_timm_gives() -> None:
    image = picture()
    assert not np.asarray(_posterize(image, 0, fillcolor=(1, 2, 3))).any()
    for bits in range(1, 9):
        assert np.array_equal(_posterize(image, bits), posterize(image, bits))


def test_no_draw_of_the_published_policy_fails() -> None:
    """Magnitudes are 9 + 0.5 g cut at 10, where no bit is left: 0.023 of posterised ones. Two ops of 15, half done."""
    augment, asked = RandAugment(VIEW.color, VIEW), []
    for op in augment.transform.ops:
        if op.aug_fn is _posterize:
            op.aug_fn = lambda image, bits, **options: (asked.append(bits), _posterize(image, bits, **options))[1]
    for words in np.random.default_rng(0).integers(0, 2**32, (1500, 4)).tolist():
        made = augment(picture(), words)
        assert made.size == (32, 32) and made.mode == "RGB"
    assert 0 in asked and 60 < len(asked) < 140  # 100 expected, with a deviation of 10


@pytest.mark.parametrize("words", [[1, 2, 3, 4], [5, 6, 7, 8]])
def test_the_same_words_give_the_same_pixels_and_global_generators_stay(words: list[int]) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    first, again = (RandAugment(VIEW.color, VIEW)(picture(), words) for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
