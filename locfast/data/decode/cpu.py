"""Decoding on the CPU: every kind of file that turns up in a folder of photographs."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, JpegImagePlugin

from locfast.data.crop import Plan
from locfast.data.decode import UnreadableImage
from locfast.data.decode.jpeg import decode, decode_jpeg, is_whole
from locfast.data.decode.resize import place, resize
from locfast.data.decode.rgb import to_rgb

# PIL knows more, but EPS would start Ghostscript on an untrusted file.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "PPM", "BMP", "GIF", "MPO", "AVIF", "JPEG2000")

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

PNG_BIT_DEPTH = 24
"""Where a PNG says how many bits a value has: behind signature (8), length and type (8), width and height (8)."""

_CPU = torch.device("cpu")

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
    """libjpeg-turbo through torchvision for JPEG, PIL for everything else and for decoding at a fraction."""

    def open(self, data: bytes) -> CpuPicture:
        return CpuPicture(data)


class CpuPicture:
    """A file whose header PIL has read. `size` is height, width after EXIF rotation."""

    @quietly
    def __init__(self, data: bytes) -> None:
        self.data, self.image = data, _open(data)
        self.is_jpeg = isinstance(self.image, JpegImagePlugin.JpegImageFile)
        if not self.is_jpeg:
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
        pixels = self._fast() if reduced == 1 else None
        pixels = self._upright(np.asarray(to_rgb(self.image)) if pixels is None else pixels)
        _, mirror_x, mirror_y = self.turn
        height, width = pixels.shape[0] * reduced, pixels.shape[1] * reduced
        before = (mirror_y * (height - self.size[0]), mirror_x * (width - self.size[1]))
        return [place(resize(pixels, plan, reduced, before), plan) for plan in plans]

    def _draft(self, shrink: float) -> int:
        """Have a JPEG decoded at 1/d of its size where `shrink` allows; returns d. Pixel x then covers x*d .. x*d+d."""
        width, height = self.image.size
        reduced = max(d for d in (1, 2, 4, 8) if d == 1 or shrink / d >= DRAFT_MARGIN)
        if reduced == 1 or not self.is_jpeg or min(width, height) < reduced:
            return 1
        drafted = self.image.draft(None, (width // reduced, height // reduced))
        return 1 if drafted is None else round(width / drafted[1][2])

    def _fast(self) -> np.ndarray | None:
        """The pixels of a plain JPEG, as PIL would give them in 1.35 times the time; None where PIL has to decide."""
        if not self.is_jpeg or self.image.mode not in ("RGB", "L") or not is_whole(self.data) or decode_jpeg is None:
            return None
        with suppress(RuntimeError):
            encoded = torch.frombuffer(self.data, dtype=torch.uint8)
            return decode([encoded], _CPU)[0].permute(1, 2, 0).numpy()
        return None

    def _upright(self, pixels: np.ndarray) -> np.ndarray:
        transpose, mirror_x, mirror_y = self.turn
        pixels = pixels.swapaxes(0, 1) if transpose else pixels
        return pixels[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]


@quietly
def decode_label_map(data: bytes) -> np.ndarray:
    """Class ids [H, W] uint8 of an encoded label map; a palette's indices are the ids. Raises UnreadableImage."""
    image = _open(data)
    if image.mode not in ("L", "P"):
        raise UnreadableImage(f"a label map needs one 8-bit channel of class ids, found mode {image.mode}")
    if image.format == "PNG" and image.mode == "L" and data[PNG_BIT_DEPTH] != 8:
        # PIL stretches such grey values to 0 .. 255, so that id 1 of 4 bits would come back as 17
        raise UnreadableImage(f"a label map needs 8 bits of class ids, found grey of {data[PNG_BIT_DEPTH]} bits")
    return np.array(image)
