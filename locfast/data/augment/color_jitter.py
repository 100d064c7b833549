"""torchvision's ColorJitter, made to draw from our keyed numbers."""

from __future__ import annotations

import itertools
import re

from PIL import Image

from locfast.data.augment.policy import uniform
from locfast.data.spec import View

NUMBER = r"(\d+(?:\.\d+)?)"
PATTERN = re.compile("jitter" + f"-{NUMBER}" * 4 + f"(?:-p{NUMBER})?")
PROBABILITY = 0.8
"""How often an image is changed at all where the text does not say: that of SimCLR, DINO and LUT."""
ORDERS = tuple(itertools.permutations(range(4)))


class ColorJitter:
    """jitter-B-C-S-H[-pP]: brightness, contrast and saturation times a factor in 1 - B .. 1 + B, 1 - C .. 1 + C and
    1 - S .. 1 + S (never below 0), hue turned by -H .. H of the circle, in any order, with probability P."""

    words = 6

    def __init__(self, text: str, view: View) -> None:
        found = PATTERN.fullmatch(text)
        if found is None:
            raise ValueError("it needs four numbers, of brightness, contrast, saturation and hue, and may end in -pP")
        *strengths, probability = found.groups()
        self.brightness, self.contrast, self.saturation, self.hue = map(float, strengths)
        self.probability = PROBABILITY if probability is None else float(probability)
        if self.hue > 0.5:
            raise ValueError(f"hue turns by at most 0.5, got {self.hue:g}")
        if self.probability > 1:
            raise ValueError(f"a probability is at most 1, got {self.probability:g}")

    def __call__(self, image: Image.Image, words: list[int]) -> Image.Image:
        from torchvision.transforms import functional as tv

        if uniform(words[0]) >= self.probability:
            return image
        changes = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        lows = (*(max(0.0, 1 - strength) for strength in strengths[:3]), -self.hue)
        highs = (*(1 + strength for strength in strengths[:3]), self.hue)
        for which in ORDERS[words[1] * len(ORDERS) >> 32]:
            if strengths[which] > 0:
                image = changes[which](image, uniform(words[2 + which], lows[which], highs[which]))
        return image
