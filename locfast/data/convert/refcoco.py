"""RefCOCO, RefCOCO+ and RefCOCOg: every sentence that refers to an object, with the object's box.

It has no captions of whole images: those of COCO are taken where its captions_*.json are given.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locfast.data.convert.coco_files import places, read_captions
from locfast.data.convert.drafts import Draft, corners, entries_of
from locfast.data.convert.lines import add_arguments as add_common
from locfast.data.convert.lines import write_lines
from locfast.data.convert.plain_pickle import read_plain_pickle
from locfast.data.convert.tally import Tally
from locfast.data.spec import Region
from locfast.errors import UserError

NEEDS = "{image_id, ann_id, split, sentences of {sent}}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("refs", type=Path, help="'refs(unc).p', 'refs(umd).p' or 'refs(google).p'")
    parser.add_argument("instances", type=Path, help="instances.json from the same folder")
    parser.add_argument("--split", default="train", help="train, val, testA, testB or test, as the refs name it")
    parser.add_argument(
        "--first-sentence", action="store_true", help="only the first sentence of an object; default: a region for each"
    )
    parser.add_argument(
        "--captions", type=Path, nargs="+", default=[], metavar="FILE", help="COCO's captions_*2014.json, one or both"
    )
    add_common(parser)


def convert(args: argparse.Namespace) -> Tally:
    def found(tally: Tally) -> Iterator[Draft]:
        sentences = 1 if args.first_sentence else None
        return drafts(args.refs, args.instances, args.split, read_captions(args.captions), tally, sentences)

    return write_lines(args, found)


def drafts(
    refs: Path, instances: Path, split: str, captions: dict[int, list[str]], tally: Tally, sentences: int | None = None
) -> Iterator[Draft]:
    """The images of a split in the order of their first reference. sentences: at most so many of each object.

    Raises UserError.
    """
    from locfast.data.labelled.coco import known, not_like_coco, read_json

    of_image = _of_split(refs, split)
    content = read_json(instances)
    try:
        images = {one["id"]: one for one in content["images"]}
        boxes = {one["id"]: corners(one["bbox"]) for one in content["annotations"]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise not_like_coco(instances, error) from None
    for id, some in of_image.items():
        regions = []
        with entries_of(refs, NEEDS):
            for ref in some:
                if ref["ann_id"] not in boxes:
                    tally.lost_regions[f"an object that is not in {instances.name}"] += len(ref["sentences"])
                    continue
                taken = ref["sentences"][:sentences]
                regions += [Region(boxes[ref["ann_id"]], str(one["sent"])) for one in taken]
        image = known(id, images, "image", instances)
        try:
            size = int(image["width"]), int(image["height"])
            yield Draft(places(str(image["file_name"])), size, tuple(captions.get(id, ())), tuple(regions))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise not_like_coco(instances, error) from None


def _of_split(file: Path, split: str) -> dict[Any, list[dict[str, Any]]]:
    """References of a split by image."""
    refs = read_plain_pickle(file, "references")
    if not isinstance(refs, list):
        raise UserError(f"asked for the references in {file}, found no list; it needs one of {NEEDS}")
    of_image: dict[Any, list[dict[str, Any]]] = {}
    with entries_of(file, NEEDS):
        there = Counter(str(ref["split"]) for ref in refs)
        for ref in refs:
            if ref["split"] == split:
                of_image.setdefault(ref["image_id"], []).append(ref)
    if not of_image:
        found = ", ".join(f"{number} of {name}" for name, number in there.items()) or "none at all"
        raise UserError(f"asked for --split {split} of {file}, found references {found}; take one of these splits")
    return of_image
