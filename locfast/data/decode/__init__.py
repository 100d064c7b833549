"""Decoders: from encoded images to the pixels of views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from locfast.data.crop import Plan
from locfast.errors import UserError, suggest


class UnreadableImage(Exception):
    """This file gives no image; the message says why in a few words that name no memory address or path."""


class Picture(Protocol):
    """An image whose header was read; a plan needs no more than its size."""

    size: tuple[int, int]
    """Height, width, after EXIF rotation."""

    def render(self, plans: Sequence[Plan]) -> list[np.ndarray]:
        """The views of `plans`: uint8 RGB [h, w, 3] each. Raises UnreadableImage for damaged pixels."""
        ...


class Decoder(Protocol):
    """Runs inside a worker process: header first, then the pixels that the plans of all views ask for."""

    def open(self, data: bytes) -> Picture:
        """Read the header. Raises UnreadableImage."""
        ...


def get_decoder(name: str) -> Decoder:
    """The decoder called `name` (`--decoder`): auto takes the best that this machine has."""
    from locfast.data.decode.cpu import CpuDecoder

    decoders = {"auto": CpuDecoder, "cpu": CpuDecoder}
    if name not in decoders:
        raise UserError(f"asked for --decoder {name}, found {', '.join(decoders)}{suggest(name, decoders)}")
    return decoders[name]()
