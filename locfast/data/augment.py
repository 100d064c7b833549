"""Colour policies: timm's RandAugment, made to draw from our keyed numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image

from locfast.data.spec import View
from locfast.errors import UserError


class RandAugment:
    """The RandAugment of a view's `color` string, as timm sets it up for training. Raises UserError for a bad one."""

    def __init__(self, view: View) -> None:
        from timm.data.auto_augment import rand_augment_transform  # timm takes a second to import

        assert view.color is not None
        options: dict[str, Any] = {
            "translate_const": int(min(view.size) * 0.45),
            "img_mean": tuple(min(255, round(255 * x)) for x in view.mean),
        }
        if view.interpolation in ("nearest", "bilinear", "bicubic"):  # PIL turns and shears with no other
            options["interpolation"] = getattr(Image.Resampling, view.interpolation.upper())
        try:
            if not view.color.startswith("rand-"):
                raise ValueError("it does not begin with rand-")
            self.transform = rand_augment_transform(view.color, options)
        except (AssertionError, ValueError, KeyError) as error:
            raise UserError(
                f"asked for the colour policy {view.color!r}, which is no RandAugment string ({error}); "
                "write one like rand-m9-mstd0.5-inc1"
            ) from None

    def __call__(self, pixels: np.ndarray, words: list[int]) -> np.ndarray:
        """Augment uint8 [h, w, 3] with a generator seeded by four 32-bit `words`; global generators stay untouched."""
        python, numpy = random.getstate(), np.random.get_state()
        try:
            random.seed(words[0] << 32 | words[1])
            np.random.seed(words[2:])
            return np.asarray(self.transform(Image.fromarray(np.ascontiguousarray(pixels))))
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
