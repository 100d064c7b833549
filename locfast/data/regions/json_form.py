"""Regions as JSON: [{"box": [left, top, right, bottom], "text": "a red kite", "score": 0.8}, ...], boxes in pixels."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from locfast.data.spec import Region


def parse_regions(value: Any) -> tuple[Region, ...] | None:
    """A list of regions as JSON gives it; `score` may be left out, and other keys do not count.

    An object is what tools keep beside an image: its "regions" are taken, None where it has none.

    What a box holds is not checked here beyond being four numbers: NaN and Infinity, which Python's JSON has, and
    swapped corners are for `regions_in_view` to drop and count. Raises ValueError that says which region is no region.
    """
    if isinstance(value, dict):
        value = value.get("regions")
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"regions are a list, not {_shown(value)}")
    return tuple(_region(number, one) for number, one in enumerate(value))


def regions_beside(value: Any) -> tuple[Region, ...] | None:
    """As `parse_regions`, of a JSON file beside an image; None where it speaks of other things.

    Those are numbers and texts, and lists without a single object that has a "box" (tags, boxes by another name): data
    sets keep what they like there.
    """
    if isinstance(value, dict):
        value = value.get("regions")
    boxed = isinstance(value, list) and any(isinstance(one, dict) and "box" in one for one in value)
    return parse_regions(value) if boxed or value == [] else None


def region_json(regions: Iterable[Region]) -> list[dict[str, Any]]:
    """The list that `parse_regions` reads."""
    return [{"box": list(region.box), "text": region.text, "score": region.score} for region in regions]


def _region(number: int, one: Any) -> Region:
    if not isinstance(one, dict):
        raise ValueError(f"region {number} is no object but {_shown(one)}")
    box, text, score = one.get("box"), one.get("text"), one.get("score", 1.0)
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise ValueError(f'"box" of region {number} is {_shown(box)}, not [left, top, right, bottom] in pixels')
    if not isinstance(text, str):
        raise ValueError(f'"text" of region {number} is {_shown(text)}, which is no string')
    if not _is_number(score):
        raise ValueError(f'"score" of region {number} is {_shown(score)}, which is no number')
    try:
        text.encode()
        left, top, right, bottom, sure = map(float, (*box, score))
    except UnicodeEncodeError:
        raise ValueError(f'"text" of region {number} has half of a surrogate pair') from None
    except OverflowError:
        raise ValueError(f"a number of region {number} has hundreds of digits") from None
    return Region((left, top, right, bottom), text.strip(), sure)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
