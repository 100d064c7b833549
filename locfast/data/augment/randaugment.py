"""timm's RandAugment, made to draw from our keyed numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image

from locfast.data.spec import View


class RandAugment:
    """The RandAugment of a string like rand-m9-mstd0.5-inc1, as timm sets it up for training."""

    words = 4

    def __init__(self, text: str, view: View) -> None:
        from timm.data.auto_augment import posterize, rand_augment_transform  # timm takes a second to import

        if not text.startswith("rand-"):
            raise ValueError("it does not begin with rand-")
        options: dict[str, Any] = {
            "translate_const": int(min(view.size) * 0.45),
            "img_mean": tuple(min(255, round(255 * x)) for x in view.mean),
        }
        if view.interpolation in ("nearest", "bilinear", "bicubic"):  # PIL turns and shears with no other
            options["interpolation"] = getattr(Image.Resampling, view.interpolation.upper())
        self.transform = rand_augment_transform(text, options)
        for op in self.transform.ops:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize

    def __call__(self, image: Image.Image, words: list[int]) -> Image.Image:
        """With generators seeded by the words; the global ones are put back as they were."""
        python, numpy = random.getstate(), np.random.get_state()
        try:
            random.seed(words[0] << 32 | words[1])
            np.random.seed(words[2:])
            return self.transform(image)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, down to no bit at all: m9-mstd0.5-inc1 asks for that in one posterised image of 44.

    Black is what keeping no bit leaves; Pillow 13 raises instead, and the image would count as unreadable.
    """
    from timm.data.auto_augment import posterize

    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)
