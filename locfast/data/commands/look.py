"""Looking at every sample of a source: what kind of file it is, and whether it can be decoded."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from locfast.data.crop import Plan, geometry
from locfast.data.decode.cpu import CpuDecoder, decode_label_map
from locfast.data.orphan import pool
from locfast.data.reader import explain
from locfast.data.regions.in_view import regions_in_view
from locfast.data.sources import sample_name
from locfast.data.spec import Record, Source
from locfast.errors import UserError

COLOURS = {"1": "black and white", "L": "grey", "LA": "grey with transparency", "P": "palette", "CMYK": "CMYK"} | {
    "RGB": "RGB",
    "RGBA": "RGB with transparency",
    "I;16": "16-bit grey",
}
"""What PIL's modes are called; others go by their own name."""
CHUNK = 16
"""Samples that a process looks at before it reports."""


@dataclass(frozen=True)
class Look:
    """What was found out about one sample."""

    index: int
    name: str
    bytes: int = 0
    size: tuple[int, int] = (0, 0)
    """Height, width, after EXIF rotation."""
    format: str = ""
    colours: str = ""
    rotated: bool = False
    extras: tuple[str, ...] = ()
    regions: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    """How many of the regions are of no use in any view, by reason."""
    problem: str = ""


def look(source: Source, index: int) -> Look:
    """Read and decode one sample in full, as a training view of 224 pixels would."""
    try:
        record = source.read(index)
        picture = CpuDecoder().open(record.image)
        height, width = picture.size
        whole = Plan((224, 224), (0, 0, width, height), (0, 0, 224, 224), False, "bicubic")
        picture.render([whole])
        if record.label_map is not None:
            decode_label_map(record.label_map)
        kind, colours, rotated = header(record.image)
    except Exception as error:  # a source may raise anything, and the loader replaces a sample whatever it raised
        return Look(index, sample_name(source, index), problem=explain(error))
    extras = tuple(name for name in ("text", "regions", "label_map") if getattr(record, name) is not None)
    faults = region_faults(record, whole, picture.size)
    told = (len(record.image), picture.size, kind, colours, rotated, extras, len(record.regions or ()), faults)
    return Look(index, record.name, *told)


def region_faults(record: Record, whole: Plan, size: tuple[int, int]) -> dict[str, int]:
    """Regions of no use even where the view is the whole image, by reason; reasons without any are left out."""
    if not record.regions:
        return {}
    found = regions_in_view([record], geometry([whole], [size]), min_shown=0.0, min_side=0.0)
    return {reason: number for reason, number in found.dropped.items() if number}


def header(data: bytes) -> tuple[str, str, bool]:
    """Format, colours, and whether EXIF turns or mirrors it, of an image that can be decoded."""
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format or "unknown"
        if kind in ("JPEG", "MPO"):
            kind += " progressive" if "progressive" in image.info else " baseline"
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # a broken EXIF block says nothing about the pixels
            orientation = 1
        return kind, COLOURS.get(image.mode, image.mode), orientation in range(2, 9)


def looks(source: Source, count: int, workers: int) -> Iterator[Look]:
    """Look at `count` samples, evenly spread over the source. Raises UserError when a process dies."""
    indices = [i * len(source) // count for i in range(count)]
    if not workers:
        yield from (look(source, index) for index in indices)
        return
    try:
        with pool(workers, _remember, source) as helpers:
            yield from helpers.map(_look, indices, chunksize=CHUNK)
    except BrokenProcessPool:
        raise UserError(
            "a decoding process died; most often the machine ran out of memory: try fewer --workers, or --workers 0, "
            "which shows the file it happens at"
        ) from None


_source: Source


def _remember(source: Source) -> None:
    global _source
    _source = source


def _look(index: int) -> Look:
    return look(_source, index)


def summary(found: Sequence[Look]) -> dict[str, Any]:
    """What the samples looked at have in common (JSON)."""
    good = [one for one in found if not one.problem]
    bad = [one for one in found if one.problem]
    # "1 bytes not processed" and "7 bytes not processed" are one reason.
    reasons = Counter(re.sub(r"\d+", "N", one.problem) for one in bad)
    return {
        "looked_at": len(found),
        "readable": len(good),
        "formats": dict(Counter(one.format for one in good).most_common()),
        "colours": dict(Counter(one.colours for one in good).most_common()),
        "rotated": sum(one.rotated for one in good),
        "pixels": {name: spread([one.size[k] for one in good]) for name, k in (("height", 0), ("width", 1))},
        "file_bytes": spread([one.bytes for one in good]),
        **{extra: sum(extra in one.extras for one in good) for extra in ("text", "regions", "label_map")},
        "region": _regions([one for one in good if "regions" in one.extras]),
        "reasons": dict(reasons.most_common()),
        "broken": [{"index": one.index, "name": one.name, "reason": one.problem} for one in bad],
    }


def _regions(found: Sequence[Look]) -> dict[str, Any]:
    """How many regions there are, in all and in an image, and how many of them are of no use, by reason."""
    counts = [one.regions for one in found]
    faults = sum((Counter(one.faults) for one in found), Counter[str]())
    return {"count": sum(counts), "per_image": spread(counts), "dropped": dict(faults.most_common())} if counts else {}


def spread(values: Sequence[int]) -> dict[str, float]:
    """Smallest, 5th percentile, median, 95th percentile and largest; {} of nothing."""
    if not values:
        return {}
    found = np.percentile(values, (0, 5, 50, 95, 100)).tolist()
    return dict(zip(("min", "p5", "median", "p95", "max"), found, strict=True))
