"""The header of an image file: which frame its boxes belong to."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from locfast.data.convert.tally import NO_FILE

TURNED = "turned or mirrored by EXIF, and which way up its boxes lie is not told"
OTHER_SIZE = "another size than the annotations tell"
SWAPS_SIDES = (5, 6, 7, 8)


class Unfit(Exception):
    """An image that cannot be used; the message is the reason that is counted."""


def upright_size(file: Path | IO[bytes], told: tuple[int, int] | None) -> tuple[tuple[int, int], str]:
    """Width and height after EXIF rotation, as regions refer to it, and PIL's name of the format.

    told: the size that the annotations give. An image that EXIF turns is taken only where that size is the upright
    image's and not that of the pixels as they are stored: then its boxes were drawn on the upright image.
    Raises Unfit.
    """
    from PIL import ExifTags, Image

    try:
        with Image.open(file) as image:
            stored, orientation, kind = image.size, image.getexif().get(ExifTags.Base.Orientation, 1), image.format
    except FileNotFoundError:
        raise Unfit(NO_FILE) from None
    except Exception:  # PIL raises what it likes on damaged files
        raise Unfit("an image file that cannot be read") from None
    size = stored[::-1] if orientation in SWAPS_SIDES else stored
    if orientation in range(2, 9) and not (told == size != stored):
        raise Unfit(TURNED)
    if told not in (None, size):
        raise Unfit(OTHER_SIZE)
    return size, kind or ""
