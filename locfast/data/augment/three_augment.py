"""Three-augment: grey, solarised or blurred (Touvron et al., DeiT III, 2022)."""

from __future__ import annotations

from PIL import Image, ImageFilter, ImageOps

from locfast.data.augment.policy import uniform
from locfast.data.spec import View

RADIUS = (0.1, 2.0)
"""Range of the radius of the blur in pixels, as in the public DeiT III code; its solarisation inverts from 128 on."""


class ThreeAugment:
    """three: exactly one of the three, each as likely, always."""

    words = 2

    def __init__(self, text: str, view: View) -> None:
        if text != "three":
            raise ValueError("three takes no numbers")

    def __call__(self, image: Image.Image, words: list[int]) -> Image.Image:
        which = words[0] * 3 >> 32
        if which == 0:
            return image.convert("L").convert("RGB")
        if which == 1:
            return ImageOps.solarize(image, 128)
        return image.filter(ImageFilter.GaussianBlur(uniform(words[1], *RADIUS)))
