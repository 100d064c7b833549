"""One sample of GRIT in a shard of img2dataset's: KEY.jpg, and KEY.json with the caption and its phrases' boxes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locfast.data.convert.drafts import fit_regions, tidy
from locfast.data.convert.pictures import Unfit, upright_size
from locfast.data.convert.tally import Tally
from locfast.data.spec import Record, Region
from locfast.errors import UserError

PHRASES = {"ref_exps": ("ref_exps",), "noun_chunks": ("noun_chunks",), "both": ("ref_exps", "noun_chunks")}
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}
"""PIL's name of a format -> the ending of a member, where it is not that name in small letters."""
ROUNDING = 2
"""Pixels by which a side may differ from the original's scaled: img2dataset rounds each side down."""


@dataclass(frozen=True)
class Options:
    phrases: str = "ref_exps"
    min_score: float = 0.0

    def told(self) -> dict[str, Any]:
        return asdict(self)


def samples(shard: Path, options: Options, tally: Tally) -> Iterator[tuple[str, str, Record]]:
    """Key, ending of the image and record of every sample that can be used; the others are counted.

    Raises UserError for a shard that is missing, broken, or was downloaded without the boxes.
    """
    from locfast.data.sources.tar_index import FIELDS, scan

    image_at, json_at = FIELDS.index("image"), FIELDS.index("regions")
    try:
        with open(shard, "rb") as file:
            index = scan(str(shard), file, shard.stat().st_size)
            for key, place in zip(index.keys, index.place.tolist(), strict=True):
                if place[json_at][0] < 0:
                    tally.lose("no JSON beside it", f"{shard}/{key}")
                    continue
                image, meta = (_member(file, *place[which]) for which in (image_at, json_at))
                try:
                    yield key, *_sample(image, _json(meta), options, tally, shard)
                except Unfit as unfit:
                    tally.lose(str(unfit), f"{shard}/{key}")
    except OSError as error:
        raise UserError(f"asked for the shard {shard}, which cannot be read ({error.strerror or error})") from None


def _member(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _json(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise Unfit("JSON that cannot be read")
    return meta


def _sample(image: bytes, meta: dict[str, Any], options: Options, tally: Tally, shard: Path) -> tuple[str, Record]:
    caption = meta.get("caption")
    if not isinstance(caption, str) or not tidy(caption):
        raise Unfit("no caption, from which the phrases are cut")
    size, kind = upright_size(io.BytesIO(image), None)
    if not _whole(size, meta):
        raise Unfit("another shape than the original: it was cropped or padded, and the boxes are of the original")
    rows = [row for column in PHRASES[options.phrases] for row in _rows(meta, column, shard)]
    found = [region for row in rows if (region := _region(row, caption, size, options.min_score, tally))]
    regions = fit_regions(found, size, tally)
    tally.keep(1, len(regions))
    return EXTENSIONS.get(kind, kind.lower()), Record(image, texts=(tidy(caption),), regions=tuple(regions))


def _whole(size: tuple[int, int], meta: dict[str, Any]) -> bool:
    """Whether the image shows all of the original, as far as the JSON tells."""
    width, height = meta.get("original_width"), meta.get("original_height")
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        return True
    scale = max(size) / max(width, height)
    return abs(size[0] - scale * width) <= ROUNDING and abs(size[1] - scale * height) <= ROUNDING


def _rows(meta: dict[str, Any], column: str, shard: Path) -> list[Any]:
    if column not in meta:
        raise UserError(
            f"asked for GRIT's boxes in {shard}, found no {column} in its JSON (only {', '.join(meta)}); download with "
            'img2dataset ... --save_additional_columns \'["noun_chunks","ref_exps"]\''
        )
    rows = meta[column]
    if isinstance(rows, str):  # a column that went through a table of text
        try:
            rows = json.loads(rows)
        except ValueError:
            raise Unfit("boxes that cannot be read") from None
    if rows is not None and not isinstance(rows, list):
        raise Unfit("boxes that cannot be read")
    return rows or []


def _region(row: Any, caption: str, size: tuple[int, int], min_score: float, tally: Tally) -> Region | None:
    """[start, end, left, top, right, bottom, score]: where the phrase stands in the caption, its box in [0, 1]."""
    try:
        start, end, left, top, right, bottom, score = map(float, row)
        if not (start.is_integer() and end.is_integer() and 0 <= start < end <= len(caption)):
            tally.lost_regions["a phrase that lies outside the caption"] += 1
            return None
    except (TypeError, ValueError):
        tally.lost_regions["a row that is not start, end, four edges and a score"] += 1
        return None
    if score < min_score:
        tally.lost_regions[f"a score below {min_score:g}"] += 1
        return None
    width, height = size
    return Region((left * width, top * height, right * width, bottom * height), caption[int(start) : int(end)], score)
