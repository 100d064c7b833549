"""Decoding with PIL: every kind of file that turns up in a folder of photographs."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin

from locfast.data.crop import Plan
from locfast.data.decode import UnreadableImage
from locfast.data.decode.rgb import to_rgb

# PIL knows more, but EPS would start Ghostscript on an untrusted file.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "PPM", "BMP", "GIF", "MPO", "AVIF", "JPEG2000")
RESAMPLING = {each.name.lower(): each for each in Image.Resampling}

ORIENTATIONS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
"""EXIF orientation: how stored pixels become upright: transpose, then mirror along x, along y."""

DRAFT_MARGIN = 2.0
"""JPEG blocks are decoded at 1/2, 1/4 or 1/8 only while the resampling still shrinks at least this much: PIL's own
`reducing_gap` of thumbnails, at which the result is nearly that of decoding in full."""


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn whatever PIL raises into UnreadableImage, and its remarks about odd metadata into silence."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return function(*args)
            except UnreadableImage:
                raise
            except Image.UnidentifiedImageError:
                raise UnreadableImage("not an image of a known format") from None
            except Image.DecompressionBombError as error:
                raise UnreadableImage(f"refused as a decompression bomb: {error}") from None
            except Exception as error:  # damaged files raise OSError, SyntaxError, struct.error, ZeroDivisionError, ...
                raise UnreadableImage(f"{type(error).__name__}: {error}") from None

    return wrapper


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise UnreadableImage("the file is empty")
    return Image.open(io.BytesIO(data), formats=_formats())


class CpuDecoder:
    """PIL, one image at a time."""

    def open(self, data: bytes) -> CpuPicture:
        return CpuPicture(data)


class CpuPicture:
    """A file that PIL has opened. `size` is height, width after EXIF rotation."""

    @quietly
    def __init__(self, data: bytes) -> None:
        self.image = _open(data)
        if not isinstance(self.image, JpegImagePlugin.JpegImageFile):
            # PNG keeps EXIF behind its pixels, and TIFF turns itself while loading.
            self.image.load()
        try:
            orientation = self.image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # a broken EXIF block says nothing about the pixels
            orientation = 1
        self.turn = ORIENTATIONS.get(orientation, ORIENTATIONS[1])
        width, height = self.image.size
        self.size = (width, height) if self.turn[0] else (height, width)

    @quietly
    def render(self, plans: Sequence[Plan]) -> list[np.ndarray]:
        """The views of `plans`: uint8 RGB [h, w, 3] each. Raises UnreadableImage for damaged pixels."""
        reduced = self._draft(min(plan.shrink for plan in plans))
        pixels = to_rgb(self.image)
        return [self._view(pixels, reduced, plan) for plan in plans]

    def _draft(self, shrink: float) -> int:
        """Have a JPEG decoded at 1/d of its size where `shrink` allows; returns d. Pixel x then covers x*d .. x*d+d."""
        width, height = self.image.size
        reduced = max(d for d in (1, 2, 4, 8) if d == 1 or shrink / d >= DRAFT_MARGIN)
        if reduced == 1 or not isinstance(self.image, JpegImagePlugin.JpegImageFile) or min(width, height) < reduced:
            return 1
        drafted = self.image.draft(None, (width // reduced, height // reduced))
        return 1 if drafted is None else round(width / drafted[1][2])

    def _view(self, pixels: Image.Image, reduced: int, plan: Plan) -> np.ndarray:
        x0, y0, x1, y1 = plan.inside
        transpose, mirror_x, mirror_y = self.turn
        left, top, right, bottom = plan.box
        if mirror_x:
            left, right = self.size[1] - right, self.size[1] - left
        if mirror_y:
            top, bottom = self.size[0] - bottom, self.size[0] - top
        size = (x1 - x0, y1 - y0)
        if transpose:
            left, top, right, bottom, size = top, left, bottom, right, size[::-1]
        # With a box, PIL's filters still see the pixels around it, so this equals resizing everything and cropping.
        box = (left / reduced, top / reduced, min(right / reduced, pixels.width), min(bottom / reduced, pixels.height))
        part = np.asarray(pixels.resize(size, RESAMPLING[plan.interpolation], box=box))
        part = part.swapaxes(0, 1) if transpose else part
        part = part[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
        height, width = plan.size
        if plan.inside != (0, 0, width, height):
            part = np.pad(part, ((y0, height - y1), (x0, width - x1), (0, 0)), mode="reflect")
        return part[:, ::-1] if plan.flip else part


@quietly
def decode_label_map(data: bytes) -> np.ndarray:
    """Class ids [H, W] uint8 of an encoded label map; a palette's indices are the ids. Raises UnreadableImage."""
    image = _open(data)
    if image.mode not in ("L", "P"):
        raise UnreadableImage(f"a label map needs one 8-bit channel of class ids, found mode {image.mode}")
    return np.array(image)
