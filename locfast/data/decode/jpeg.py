"""JPEG: whether a file is whole, by its markers alone, and torchvision's decoders."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import torch
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 says that it will give decoding up
    decode_jpeg = None

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_APP1, _ORIENTATION, _SHORT = 0xE1, 0x0112, 3
_UNUSUAL = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
"""Frames that are lossless, hierarchical or coded arithmetically: no GPU decoder reads them."""
_ALONE = (0x01, *range(0xD0, 0xD8))
"""Markers without a length: TEM and RST0 to RST7. The latter lie inside scans."""


def is_whole(data: bytes) -> bool:
    """Whether segments and scans of a usual JPEG follow each other up to the end marker, as an encoder writes them.

    Decoders differ in what they make of a file that is cut off or has stray markers between its pixels: one raises,
    one fills with grey. Where this is False, the CPU decoder decides for all of them. Takes 30 to 80 us for 100 kB.
    """
    if data[:2] != b"\xff\xd8":
        return False
    pixels = np.frombuffer(data, dtype=np.uint8)
    lead = np.flatnonzero(pixels[:-1] == 0xFF)
    kind = pixels[lead + 1]
    # inside a scan a byte of 0xFF is followed by 0 and means itself; restart markers belong there, 0xFF fills
    markers = lead[(kind != 0) & (kind != 0xFF) & ~((kind >= 0xD0) & (kind <= 0xD7))]
    place, length = 2, len(data)
    while place + 1 < length:
        if data[place] != 0xFF:
            return False
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
        elif marker == _END:
            return True
        elif marker == _START or marker in _UNUSUAL:
            return False
        elif marker in _ALONE:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            if marker == _SCAN:
                following = np.searchsorted(markers, place)
                if following == len(markers):
                    return False
                place = int(markers[following])
    return False


def plain_orientation(data: bytes) -> int | None:
    """EXIF orientation of a whole JPEG where nobody can read it otherwise: 1 without one; None where readers differ.

    They differ over several EXIF blocks, a broken one, and a number that is not one of 16 bits.
    """
    found: list[bytes] = []
    place = 2
    while data[place + 1] != _SCAN:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == _APP1 and data[place + 4 : place + 10] == b"Exif\0\0":
            found.append(data[place + 10 : end])
        if data[place + 1] in (0xFF, *_ALONE):
            return None
        place = end
    if len(found) != 1:
        return None if found else 1
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(found[0][:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", found[0], 4)
        (count,) = struct.unpack_from(f"{order}H", found[0], start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number, value = struct.unpack_from(f"{order}HHIH", found[0], entry)
            if tag == _ORIENTATION:
                return value if (kind, number) == (_SHORT, 1) else None
    except struct.error:
        return None
    return 1


def decode(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """RGB pixels uint8 [3, H, W] of encoded files [bytes] uint8: libjpeg-turbo's on the CPU, nvJPEG's on a GPU.

    EXIF rotation is left to the caller. Raises RuntimeError for a file that cannot be decoded.
    """
    assert decode_jpeg is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bytes that are not writable, and torchvision's plans
        decoded: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return decoded
