"""Any pixels that PIL can load, as 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

from locfast.data.decode import UnreadableImage

PAPER = (255, 255, 255)
"""What lies behind transparent pixels: pictures with transparency are mostly drawn for white pages, and dropping the
channel (PIL's `convert`) would show colours that nobody was meant to see."""


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image in any mode; colour profiles are not applied.

    Transparent pixels lie on white; grey values of 16 bits are scaled by 1/257; CMYK is inverted as Adobe's files
    need (PIL does that). Raises UnreadableImage for pixels without an agreed range, and what loading raises.
    """
    image.load()
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, (*PAPER, 255))
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels have no agreed range; convert to 8 or 16 bits")
    return image.convert("RGB")


def _from_16_bits(pixels: np.ndarray) -> Image.Image:
    if pixels.min() < 0 or pixels.max() > 65535:
        raise UnreadableImage(f"integer pixels from {pixels.min()} to {pixels.max()} lie outside 0 .. 65535")
    return Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))
