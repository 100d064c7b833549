"""Colour policies of views: parts joined by +, each of which draws from our keyed numbers and changes an image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from locfast.data.augment.color_jitter import ColorJitter
from locfast.data.augment.policy import Policy
from locfast.data.augment.randaugment import RandAugment
from locfast.data.augment.three_augment import ThreeAugment
from locfast.data.spec import View
from locfast.errors import UserError
from locfast.random import Keys, random_words

KINDS: dict[str, Callable[[str, View], Policy]] = {"rand": RandAugment, "jitter": ColorJitter, "three": ThreeAugment}
EXAMPLES = "rand-m9-mstd0.5-inc1, jitter-0.4-0.4-0.2-0.1 (brightness, contrast, saturation, hue) or three"


class Augment:
    """The colour policy of a view's `color` string: its parts, joined by +, one after the other.

    rand-...: timm's RandAugment. jitter-B-C-S-H, with -pP behind it or 0.8: torchvision's ColorJitter with probability
    P. three: exactly one of grey, solarised and blurred. Raises UserError for any other string.
    """

    def __init__(self, view: View) -> None:
        assert view.color is not None
        self.parts = [_part(text, view) for text in view.color.split("+")]

    def __call__(self, pixels: np.ndarray, keys: Keys, stream: str) -> np.ndarray:
        """Change uint8 [h, w, 3] as the one sample of `keys` draws it; global generators stay untouched."""
        image = Image.fromarray(np.ascontiguousarray(pixels))
        for place, part in enumerate(self.parts):
            words = random_words(keys, f"{stream}.{place}" if place else stream, part.words)
            image = part(image, words[0].tolist())
        return np.asarray(image)


def _part(text: str, view: View) -> Policy:
    kind = KINDS.get(text.split("-")[0])
    try:
        if kind is None:
            raise ValueError(f"it begins with none of {', '.join(KINDS)}")
        return kind(text, view)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"asked for the colour policy {view.color!r}, whose part {text!r} is none ({error}); write one like "
            f"{EXAMPLES}, or several joined by +"
        ) from None
