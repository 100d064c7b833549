"""Boxes of COCO's instance files and of LVIS, each with the name of its class as its phrase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from locfast.data.convert.coco_files import FOLDERS
from locfast.data.labelled.coco import known, not_like_coco, read_json, require_files
from locfast.data.sources.names import Names
from locfast.data.spec import Record, Region
from locfast.errors import UserError


class AnnotatedBoxes:
    """The images with boxes of a JSON in COCO's form, in its order; LVIS's is COCO's with URLs for file names.

    `classes` are the names in the order of their ids, with spaces for underscores ("hot_dog"); two ids of one name are
    one class. `left_out` counts boxes that are of no use by reason (crowds), `empty` images without any other. `sizes`
    [M, 2] int64 are heights and widths of the images as the file has them.

    images: the folder of the images; None: where they lie beside the file in the data sets' own layouts. Raises
    UserError for a file of another form, and for images that are absent.
    """

    def __init__(self, file: Path, images: Path | None = None) -> None:
        self.file = file
        if not file.is_file():
            raise UserError(f"asked for the annotations in {file}, found no such file; check the path")
        content = read_json(file)
        try:
            self._fill(content)
            listed = [named(content["images"][i]) for i in self._image]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise not_like_coco(file, error) from None
        if not listed:
            raise UserError(f"asked for the boxes in {file}, found none among {len(content['images'])} images")
        self.root, name_of = _find(file, listed, images)
        names = [name_of(name) for name in listed]
        require_files(self.root, names, file)
        self._names = Names(names)

    def _fill(self, content: dict[str, Any]) -> None:
        categories = sorted(content["categories"], key=lambda one: one["id"])
        texts = [class_text(str(one["name"])) for one in categories]
        self.classes = tuple(dict.fromkeys(texts))
        number = {text: i for i, text in enumerate(self.classes)}
        class_of = {one["id"]: number[text] for one, text in zip(categories, texts, strict=True)}
        row_of = {image["id"]: row for row, image in enumerate(content["images"])}
        rows, classes, boxes, crowds = [], [], [], 0
        for one in content["annotations"]:
            row = known(one["image_id"], row_of, "image", self.file)
            if one.get("iscrowd"):
                crowds += 1
                continue
            left, top, width, height = map(float, one["bbox"])
            boxes.append((left, top, left + width, top + height))
            classes.append(known(one["category_id"], class_of, "category", self.file))
            rows.append(row)
        order = np.argsort(np.array(rows, dtype=np.int64), kind="stable")
        self._boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)[order]
        self._class = np.array(classes, dtype=np.int64)[order]
        self._image, first = np.unique(np.array(rows, dtype=np.int64)[order], return_index=True)
        self._starts = np.append(first, len(order))
        sizes = [(image["height"], image["width"]) for image in content["images"]]
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)[self._image]
        self.left_out = {"crowd": crowds} if crowds else {}
        self.empty = len(content["images"]) - len(self._image)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self.root / self._names[index])

    def read(self, index: int) -> Record:
        """Raises OSError where the image cannot be read."""
        own = slice(self._starts[index], self._starts[index + 1])
        told = zip(self._boxes[own].tolist(), self._class[own].tolist(), strict=True)
        regions = tuple(Region((left, top, right, bottom), self.classes[i]) for (left, top, right, bottom), i in told)
        name = self.name(index)
        return Record(Path(name).read_bytes(), name, regions=regions)

    def __repr__(self) -> str:
        return f"{len(self)} images with {len(self._boxes)} boxes of {self.file}"


def class_text(name: str) -> str:
    """A class as one would write it: "record_player" -> "record player", LVIS's "bat_(animal)" -> "bat (animal)"."""
    return name.replace("_", " ")


def named(image: dict[str, Any]) -> str:
    """An image's path as its entry tells: its file name, or the end of COCO's URL.

    LVIS v1 has the URL alone; v0.5, which lists classes that were not searched for, a file name of COCO's of 2014 too.
    """
    if "file_name" in image and not ("coco_url" in image and "not_exhaustive_category_ids" in image):
        return str(image["file_name"])
    return str(PurePosixPath(*PurePosixPath(urlsplit(str(image["coco_url"])).path).parts[-2:]))


def _find(file: Path, names: list[str], images: Path | None) -> tuple[Path, Callable[[str], str]]:
    """The folder of the images and how names become paths in it, by the first few images."""
    for base in [images] if images else _around(file):
        for name_of in (str, _base_name):
            if any((base / name_of(name)).is_file() for name in names[:8]):
                return base, name_of
    looked = images or f"{file.parent} and {file.parent.parent}, images/ and COCO's folders (val2017, ...) in both"
    raise UserError(
        f"asked for the images of {file}, found none of the first {len(names[:8])} (e.g. {names[0]}) in {looked}; give "
        "their folder: --image-folder DIR"
    )


def _around(file: Path) -> Iterator[Path]:
    for root in (file.parent, file.parent.parent):
        for base in (root, root / "images"):
            yield from (base / name for name in FOLDERS)


def _base_name(name: str) -> str:
    return PurePosixPath(name).name
