"""What a method needs of a source beside images: one message before a run, not one for every sample."""

from __future__ import annotations

from collections.abc import Callable

from locfast.data.spec import Record, Region, Source
from locfast.errors import UserError

LOOKED_AT = 8
"""Samples, spread over a source, that tell whether it has texts at all."""
LOOKED_AT_FOR_REGIONS = 64
"""More of them: a source may have regions on a tenth of its images, and 64 of such all lack them once in 850 times."""


def check_texts(source: Source) -> None:
    """Raise UserError where none of a few samples has a text: one message, before every sample counts as unreadable."""
    if missed := _looked_at_in_vain(source, LOOKED_AT, lambda record: bool(record.texts)):
        raise UserError(
            f"asked for images with texts, found {source!r}; of each of the {missed} samples looked at: it has no "
            "text. Give a .jsonl of images and captions, or a folder or tar shards with KEY.txt beside every image"
        )


def check_regions(source: Source) -> None:
    """Raise UserError where none of some samples has a region, or none a box wider and higher than a pixel: a run would
    learn from whole images alone."""
    if missed := _looked_at_in_vain(source, LOOKED_AT_FOR_REGIONS, lambda record: bool(record.regions)):
        raise UserError(
            f"asked for images with regions, found {source!r}; of each of the {missed} samples looked at: it has no "
            'region. Give a .jsonl of images with "regions", or tar shards with KEY.json beside the images, as '
            "docs/data.md has them"
        )
    if _looked_at_in_vain(source, LOOKED_AT_FOR_REGIONS, lambda record: any(map(_has_area, record.regions or ()))):
        raise UserError(
            f"asked for images with regions, found {source!r}; of those looked at: no box is a pixel wide and high. "
            "Boxes are [left, top, right, bottom] in pixels of the image, neither shares of its sides nor [left, top, "
            "width, height]"
        )


def _has_area(region: Region) -> bool:
    left, top, right, bottom = region.box
    return right - left >= 1 and bottom - top >= 1


def _looked_at_in_vain(source: Source, count: int, has: Callable[[Record], bool]) -> int:
    """How many samples were looked at where none of them `has` it, else 0."""
    places = sorted({i * (len(source) - 1) // (count - 1) for i in range(count)})
    return 0 if any(_read_has(source, place, has) for place in places) else len(places)


def _read_has(source: Source, place: int, has: Callable[[Record], bool]) -> bool:
    try:
        return has(source.read(place))
    except Exception:  # whatever is wrong with it, the loader tells
        return False
