"""Decoders: from encoded images to the pixels of views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from locfast.data.crop import Plan


class UnreadableImage(Exception):
    """This file gives no image; the message says why in a few words that name no memory address or path."""


class Picture(Protocol):
    """An image whose header was read; a plan needs no more than its size."""

    size: tuple[int, int]
    """Height, width, after EXIF rotation."""

    def render(self, plans: Sequence[Plan]) -> list[np.ndarray]:
        """The views of `plans`: uint8 RGB [h, w, 3] each. Raises UnreadableImage for damaged pixels."""
        ...
