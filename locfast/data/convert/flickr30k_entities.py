"""Flickr30k Entities: every phrase of the five captions that has boxes.

The boxes count pixels from 1 and name the last pixel inside, as PASCAL VOC's do; both is undone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from locfast.data.convert.drafts import Draft
from locfast.data.convert.lines import add_arguments as add_common
from locfast.data.convert.lines import write_lines
from locfast.data.convert.tally import Tally
from locfast.data.spec import Region
from locfast.errors import UserError

PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]*)\]")
Box = tuple[float, float, float, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, help="the folder that holds Annotations and Sentences")
    parser.add_argument(
        "--split", type=Path, metavar="FILE", help="train.txt, val.txt or test.txt; default: all images"
    )
    parser.add_argument(
        "--several",
        choices=("merge", "each"),
        default="merge",
        help="a phrase with several boxes: one box around them all (default), or a region for each",
    )
    add_common(parser)


def convert(args: argparse.Namespace) -> Tally:
    return write_lines(args, lambda tally: drafts(args.root, args.split, args.several == "merge", tally))


def drafts(root: Path, split: Path | None, merge: bool, tally: Tally) -> Iterator[Draft]:
    """The images of a split, in the order of its file, or all in the order of their numbers. Raises UserError."""
    sentences, annotations = root / "Sentences", root / "Annotations"
    if not sentences.is_dir() or not annotations.is_dir():
        raise UserError(
            f"asked for Flickr30k Entities in {root}, found no folders Annotations and Sentences side by side; unpack "
            "annotations.zip and give its folder"
        )
    for id in _ids(sentences, split):
        try:
            text = (sentences / f"{id}.txt").read_text(encoding="utf-8")
            size, boxes = _boxes(annotations / f"{id}.xml")
        except FileNotFoundError as error:
            tally.lose(f"no {Path(error.filename).parent.name} file", f"{id}.jpg")
            continue
        except (UnicodeDecodeError, ElementTree.ParseError, AttributeError, TypeError, ValueError):
            tally.lose("annotations that cannot be read", f"{id}.jpg")
            continue
        lines = [line for line in text.splitlines() if line.strip()]
        captions = tuple(PHRASE.sub(r"\2", line) for line in lines)
        yield Draft((f"{id}.jpg",), size, captions, tuple(_regions(lines, boxes, merge, tally)))


def _regions(lines: list[str], boxes: dict[str, list[Box]], merge: bool, tally: Tally) -> Iterator[Region]:
    for line in lines:
        for chain, phrase in PHRASE.findall(line):
            if chain not in boxes:
                tally.lost_regions["a phrase without a box (not visual, the whole scene, or not seen)"] += 1
            elif merge:
                left, top, right, bottom = zip(*boxes[chain], strict=True)
                yield Region((min(left), min(top), max(right), max(bottom)), phrase)
            else:
                yield from (Region(box, phrase) for box in boxes[chain])


def _boxes(file: Path) -> tuple[tuple[int, int], dict[str, list[Box]]]:
    """Width and height of an image, and the boxes of every chain of phrases that has any.

    Raises FileNotFoundError, ElementTree.ParseError, and AttributeError, TypeError or ValueError for what is not as
    published.
    """
    with open(file, "rb") as raw:
        tree = ElementTree.parse(raw).getroot()
    size = int(tree.find("size/width").text), int(tree.find("size/height").text)  # type: ignore[union-attr,arg-type]
    boxes: dict[str, list[Box]] = {}
    for one in tree.iter("object"):
        if (box := one.find("bndbox")) is None:
            continue
        left, top, right, bottom = (float(box.find(name).text) for name in ("xmin", "ymin", "xmax", "ymax"))  # type: ignore[union-attr,arg-type]
        for chain in one.iter("name"):
            boxes.setdefault((chain.text or "").strip(), []).append((left - 1, top - 1, right, bottom))
    return size, boxes


def _ids(sentences: Path, split: Path | None) -> list[str]:
    if split is None:
        names = [file.stem for file in sentences.glob("*.txt")]
        return sorted(names, key=lambda name: (len(name), name))
    try:
        return split.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"asked for --split {split}, which cannot be read ({error}); give train.txt or its like"
        ) from None
