"""Images as a data set's files describe them, and the rule by which their boxes and phrases are taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from locfast.data.convert.tally import Tally
from locfast.data.spec import Region
from locfast.errors import UserError


@dataclass(frozen=True)
class Draft:
    """One image, nothing of it checked yet."""

    files: tuple[str, ...]
    """Where it may lie below one of the folders of images: the first that is there is taken."""
    size: tuple[int, int] | None
    """Width and height that the annotations tell, in pixels; None where they do not."""
    texts: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()


def tidy(text: str) -> str:
    """White space made single, and halves of surrogate pairs left out, which are in no UTF-8 file."""
    return " ".join(text.encode("utf-8", "ignore").decode().split())


def corners(box: Iterable[float]) -> tuple[float, float, float, float]:
    """[left, top, width, height], as COCO and Visual Genome have it, as the four edges of a box."""
    left, top, width, height = map(float, box)
    return left, top, left + width, top + height


def fit_regions(regions: Iterable[Region], size: tuple[int, int], tally: Tally) -> list[Region]:
    """The regions that can be used on an image of this width and height, in their order; the others are counted.

    Boxes are cut to the image. Dropped: a box with NaN or infinity, with swapped corners, without area, or wholly
    outside; a region without text; a text that the same box already has.
    """
    kept: dict[tuple[tuple[float, ...], str], Region] = {}
    for region in regions:
        left, top, right, bottom = region.box
        text = tidy(region.text)
        box = max(0.0, left), max(0.0, top), min(float(size[0]), right), min(float(size[1]), bottom)
        if not all(map(math.isfinite, (*region.box, region.score))):
            reason = "a box or score that is no finite number"
        elif right < left or bottom < top:
            reason = "a box with swapped corners"
        elif right == left or bottom == top:
            reason = "a box without area"
        elif box[2] <= box[0] or box[3] <= box[1]:
            reason = "a box outside the image"
        elif not text:
            reason = "no text"
        elif (box, text) in kept:
            reason = "said twice of the same box"
        else:
            kept[box, text] = replace(region, box=box, text=text)
            continue
        tally.lost_regions[reason] += 1
    return list(kept.values())


@contextmanager
def entries_of(file: object, needs: str) -> Iterator[None]:
    """UserError where an entry of `file` lacks something or holds something of another kind; `needs`: what it holds."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"asked for the annotations in {file}, found an entry that is not as published ({error!r}); it needs "
            f"{needs}"
        ) from None
