"""COCO: every object's box with the name of its class, and captions where a captions_*.json is given.

Crowds are dropped: their box holds many things. An image without objects is kept where it has a caption.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from locfast.data.convert.coco_files import places, read_captions
from locfast.data.convert.drafts import Draft, corners
from locfast.data.convert.lines import add_arguments as add_common
from locfast.data.convert.lines import write_lines
from locfast.data.convert.tally import Tally
from locfast.data.spec import Region


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("instances", type=Path, help="instances_train2017.json, or another in its form")
    parser.add_argument(
        "--captions", type=Path, nargs="+", default=[], metavar="FILE", help="captions_train2017.json, one or more"
    )
    add_common(parser)


def convert(args: argparse.Namespace) -> Tally:
    def found(tally: Tally) -> Iterator[Draft]:
        return drafts(args.instances, read_captions(args.captions), tally, str, lambda image: str(image["file_name"]))

    return write_lines(args, found)


def drafts(
    file: Path,
    captions: dict[int, list[str]],
    tally: Tally,
    text_of: Callable[[str], str],
    file_name: Callable[[dict[str, Any]], str],
) -> Iterator[Draft]:
    """All images of a file in COCO's form, in its order. text_of: a class's name -> its text. Raises UserError."""
    from locfast.data.labelled.coco import known, not_like_coco, read_json

    content = read_json(file)
    try:
        text = {one["id"]: text_of(str(one["name"])) for one in content["categories"]}
        regions: dict[Any, list[Region]] = {image["id"]: [] for image in content["images"]}
        for one in content["annotations"]:
            of_image = known(one["image_id"], regions, "image", file)
            if one.get("iscrowd"):
                tally.lost_regions["a crowd"] += 1
                continue
            of_image.append(Region(corners(one["bbox"]), known(one["category_id"], text, "category", file)))
        for image in content["images"]:
            size = int(image["width"]), int(image["height"])
            texts = tuple(captions.get(image["id"], ()))
            yield Draft(places(file_name(image)), size, texts, tuple(regions[image["id"]]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise not_like_coco(file, error) from None
