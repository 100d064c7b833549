"""Visual Genome: every region description with its box.

It has no captions of whole images. About half of the images are COCO's too: their captions are taken where COCO's
files are given; --compose-captions makes a caption of phrases for the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import urlsplit

from locfast.data.convert.coco_files import read_captions, read_json_of
from locfast.data.convert.drafts import Draft, corners, entries_of
from locfast.data.convert.lines import add_arguments as add_common
from locfast.data.convert.lines import write_lines
from locfast.data.convert.tally import Tally
from locfast.data.spec import Region
from locfast.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("descriptions", type=Path, help="region_descriptions.json")
    parser.add_argument("image_data", type=Path, help="image_data.json, of the same version")
    parser.add_argument(
        "--captions", type=Path, nargs="+", default=[], metavar="FILE", help="COCO's captions_*.json, for its images"
    )
    add_common(parser)


def convert(args: argparse.Namespace) -> Tally:
    return write_lines(
        args, lambda tally: drafts(args.descriptions, args.image_data, read_captions(args.captions), tally)
    )


def drafts(descriptions: Path, image_data: Path, captions: dict[int, list[str]], tally: Tally) -> Iterator[Draft]:
    """The images of region_descriptions.json in its order, those without regions behind them. Raises UserError."""
    images = {_id(one, image_data): one for one in _objects(image_data, "images")}
    described: set[int] = set()
    for entry in _objects(descriptions, "region descriptions"):
        id = _id(entry, descriptions)
        described.add(id)
        with entries_of(descriptions, "regions of {phrase, x, y, width, height}"):
            regions = tuple(
                Region(corners((one["x"], one["y"], one["width"], one["height"])), str(one["phrase"]))
                for one in entry["regions"]
            )
        if id not in images:
            tally.lose(f"not in {image_data.name}", f"image {id}")
            continue
        yield _draft(images[id], regions, image_data, captions)
    for id, image in images.items():
        if id not in described:
            yield _draft(image, (), image_data, captions)


def _draft(image: dict[str, Any], regions: tuple[Region, ...], file: Path, captions: dict[int, list[str]]) -> Draft:
    with entries_of(file, "url, width and height"):
        path = PurePosixPath(urlsplit(str(image["url"])).path)
        texts = captions.get(image["coco_id"], ()) if image.get("coco_id") else ()
        size = int(image["width"]), int(image["height"])
    return Draft((str(PurePosixPath(*path.parts[-2:])), path.name), size, tuple(texts), regions)


def _objects(file: Path, what: str) -> list[dict[str, Any]]:
    content = read_json_of(file, what)
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise UserError(f"asked for the {what} in {file}, found no list of objects; give Visual Genome's file of them")
    return cast("list[dict[str, Any]]", content)


def _id(entry: dict[str, Any], file: Path) -> int:
    """Version 1.0 calls it `id` in both files, later ones `image_id` in one of them or both."""
    with entries_of(file, "an image_id or id"):
        return int(entry["image_id"] if "image_id" in entry else entry["id"])
