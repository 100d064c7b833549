"""Images as captioner and detector take them, through the data layer's decoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from locfast.data.crop import Plan
from locfast.data.decode.cpu import CpuDecoder, CpuPicture

ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "PPM": "ppm", "BMP": "bmp"} | {
    "GIF": "gif",
    "AVIF": "avif",
    "JPEG2000": "jp2",
}
"""By PIL's name of the format, how the file of an image ends."""


@dataclass(frozen=True)
class Framed:
    """An image in the upper left of a square frame, or squashed onto all of it."""

    pixels: np.ndarray
    """uint8 RGB [side, side, 3]; zero beside and below the image."""
    inside: tuple[int, int]
    """Height and width of the part of the frame that shows the image."""
    size: tuple[int, int]
    """Height and width of the image (after EXIF rotation)."""
    ending: str


def whole(data: bytes) -> np.ndarray:
    """uint8 RGB [height, width, 3] of an encoded image, upright. Raises UnreadableImage."""
    picture = CpuDecoder().open(data)
    return _scaled(picture, *picture.size)


def framed(data: bytes, side: int, pad: bool) -> Framed:
    """Decode an image so that its longer side is `side` pixels, or both are (`pad` False). Raises UnreadableImage."""
    picture = CpuDecoder().open(data)
    height, width = picture.size
    longest = max(height, width)
    inside = (side, side)
    if pad:
        inside = (max(1, round(height * side / longest)), max(1, round(width * side / longest)))
    frame = np.zeros((side, side, 3), np.uint8)
    frame[: inside[0], : inside[1]] = _scaled(picture, *inside)
    return Framed(frame, inside, (height, width), ENDINGS.get(picture.image.format or "", "jpg"))


def _scaled(picture: CpuPicture, height: int, width: int) -> np.ndarray:
    box = (0.0, 0.0, float(picture.size[1]), float(picture.size[0]))
    return picture.render([Plan((height, width), box, (0, 0, width, height), False, "bilinear")])[0]
