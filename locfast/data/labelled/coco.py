"""What COCO's panoptic and instance files have in common: images, categories, and files that must be there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from locfast.data.labelled.pixel_maps import COCO_SPLITS, find_coco_images
from locfast.data.labelled.split import Split, count_classes, some
from locfast.errors import UserError

T = TypeVar("T")


def has_json(root: Path, kind: str) -> bool:
    """Whether annotations/<kind>_<split>.json is there for any split."""
    names = [name for split in COCO_SPLITS.values() for name in split]
    return any((root / "annotations" / f"{kind}_{name}.json").is_file() for name in names)


def find_json(root: Path, kind: str, split: Split) -> tuple[Path, str, Path]:
    """The JSON file of a split, COCO's name for the split (train2017), and its folder of images."""
    candidates = [(root / "annotations" / f"{kind}_{name}.json", name) for name in COCO_SPLITS[split]]
    file, name = next((one for one in candidates if one[0].is_file()), (None, ""))
    if file is None:
        raise UserError(
            f"asked for the {split} split of COCO's {kind} annotations in {root}, found none of "
            f"{', '.join(str(one) for one, _ in candidates)}"
        )
    images = find_coco_images(root, name)
    if images is None:
        raise UserError(
            f"asked for the images of {file}, found neither the folder {root / name} nor {root / 'images' / name}"
        )
    return file, name, images


def read_json(file: Path) -> dict[str, Any]:
    """An annotation file with lists of images, annotations and categories; UserError where it is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"asked for the annotations in {file}, found a file that is no JSON ({error})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"asked for the annotations in {file}, found no list '{key}', which COCO's files have")
    return content


def read_categories(
    content: dict[str, Any], file: Path
) -> tuple[dict[int, int], tuple[str, ...], frozenset[int] | None]:
    """Class id by COCO's category id, names behind 0 = unlabeled, and ids of things where all categories say so."""
    categories = sorted(content["categories"], key=lambda one: one["id"])
    class_of = {one["id"]: i + 1 for i, one in enumerate(categories)}
    classes = count_classes(("unlabeled", *(str(one["name"]) for one in categories)), file)
    things = None
    if all("isthing" in one for one in categories):
        things = frozenset(class_of[one["id"]] for one in categories if one["isthing"])
    return class_of, classes, things


def known(id: Any, table: dict[Any, T], what: str, file: Path) -> T:
    """`table[id]`, or UserError where the file has no such image or category."""
    try:
        return table[id]
    except KeyError:
        raise UserError(
            f"asked for the annotations in {file}, found one of {what} {id}, which the file does not list"
        ) from None


def not_like_coco(file: Path, error: Exception) -> UserError:
    """What to tell where an entry of `file` lacks something or holds something of another kind."""
    return UserError(
        f"asked for the annotations in {file}, found an entry that is not as COCO's are ({error!r}); "
        "see cocodataset.org/#format-data for what it needs"
    )


def require_files(folder: Path, names: Iterable[str], listed_in: Path) -> None:
    """UserError where `folder` lacks files that `listed_in` lists; a folder is read once, not once a file."""
    content: dict[str, set[str]] = {}
    absent = []
    for name in names:
        parent, base = os.path.split(name)
        if parent not in content:
            inside = folder / parent
            content[parent] = set(os.listdir(inside)) if inside.is_dir() else set()
        if base not in content[parent]:
            absent.append(str(folder / name))
    if absent:
        raise UserError(
            f"asked for the files that {listed_in} lists, found {len(absent)} absent: {some(absent)}. Put them there, "
            "or take them out of the list"
        )
