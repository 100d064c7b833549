"""COCO instances: outlines of objects in a JSON, drawn to label maps when they are read."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from locfast.data.labelled.coco import (
    find_json,
    has_json,
    known,
    not_like_coco,
    read_categories,
    read_json,
    require_files,
)
from locfast.data.labelled.split import LabelledSplit, ListedImages, Split, encode_label_map
from locfast.data.sources.names import Names
from locfast.data.spec import Record
from locfast.errors import UserError

IGNORE = 255


def is_instances(root: Path) -> bool:
    return has_json(root, "instances")


def open_instances(root: Path, split: Split) -> LabelledSplit:
    """Categories in the order of their ids become the classes 1, 2, ..., all of them things; the rest is 0 = unlabeled.

    Where objects overlap, the one with fewer pixels lies on top, and of two alike the one that the file lists later.
    Crowd regions are 255 (ignore) and lie below all objects. An image without objects is all unlabeled.
    """
    file, _, images = find_json(root, "instances", split)
    _tools(file)
    content = read_json(file)
    try:
        class_of, classes, _ = read_categories(content, file)
        source = InstanceMaps(images, file, content, class_of)
    except (KeyError, TypeError) as error:
        raise not_like_coco(file, error) from None
    return LabelledSplit(source, classes, 0, frozenset(range(1, len(classes))), "coco-instances", root.name)


def _tools(file: Path) -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError(
            f"asked for the objects in {file}, found no pycocotools, which draws them; "
            "type pip install 'locfast[coco]', or use label maps (COCO-Stuff or panoptic)"
        ) from None
    return mask


class InstanceMaps(ListedImages):
    """All images of an instance JSON, in its order.

    Outlines are packed as bytes into one blob (8 bytes a coordinate), sorted by image: as Python objects they would
    cost several times as much, and again in every forked worker, because counting references writes to the pages that
    fork shares. Nothing is drawn before it is read.
    """

    def __init__(self, images: Path, file: Path, content: dict[str, Any], class_of: dict[int, int]) -> None:
        self.images, self.file = images, file
        listed, annotations = content["images"], content["annotations"]
        if not listed:
            raise UserError(f"asked for the images in {file}, found none")
        self._names = Names(str(image["file_name"]) for image in listed)
        self._sizes = np.array([(image["height"], image["width"]) for image in listed], dtype=np.int64)
        row_of = {image["id"]: row for row, image in enumerate(listed)}
        rows = np.array([known(one["image_id"], row_of, "image", file) for one in annotations], dtype=np.int64)
        require_files(images, (self._names[i] for i in range(len(self))), file)

        blob, ends, is_polygon, parts, ids = bytearray(), array("q"), bytearray(), array("q"), bytearray()
        order = np.argsort(rows, kind="stable")
        for i in order.tolist():
            one = annotations[i]
            ids.append(IGNORE if one.get("iscrowd") else known(one["category_id"], class_of, "category", file))
            shape = one.pop("segmentation")  # its memory goes as the blob grows
            if isinstance(shape, list):
                # Two points enclose nothing, and four numbers would be taken for a box.
                outlines = [array("d", outline).tobytes() for outline in shape if len(outline) >= 6]
            else:
                outlines = [_run_lengths(shape, self._sizes[rows[i]], one, file)]
            for outline in outlines:
                blob += outline
                ends.append(len(blob))
            is_polygon.append(isinstance(shape, list))
            parts.append(len(ends))
        self._blob, self._ends, self._parts = blob, np.array(ends), np.array(parts)
        self._is_polygon, self._ids = is_polygon, ids
        self._last = np.searchsorted(rows[order], np.arange(len(listed)), side="right")
        """Where the objects of every image end."""

    def label_name(self, index: int) -> str:
        return f"{self.file} (its image {self._names[index]})"

    def read(self, index: int) -> Record:
        """Raises OSError where the image cannot be read."""
        name = self.name(index)
        return Record(Path(name).read_bytes(), name, label_map=encode_label_map(self._draw(index)))

    def _draw(self, index: int) -> np.ndarray:
        mask = _tools(self.file)
        height, width = self._sizes[index].tolist()
        first, last = _between(self._last, index)
        outlined = [k for k in range(first, last) if np.ptp(_between(self._parts, k))]
        drawn = [(self._ids[k], self._run_lengths_of(k, height, width)) for k in outlined]
        areas = mask.area([shape for _, shape in drawn]) if drawn else []
        order = sorted(range(len(drawn)), key=lambda k: (drawn[k][0] != IGNORE, -int(areas[k])))
        label_map = np.zeros((height, width), dtype=np.uint8, order="F")  # column by column, as run lengths are
        for k in order:
            id, shape = drawn[k]
            label_map[mask.decode(shape).view(bool)] = id
        return np.ascontiguousarray(label_map)

    def _run_lengths_of(self, k: int, height: int, width: int) -> dict[str, Any]:
        mask = _tools(self.file)
        first, last = _between(self._parts, k)
        outlines = [self._blob[slice(*_between(self._ends, part))] for part in range(first, last)]
        if not self._is_polygon[k]:
            return {"size": [height, width], "counts": bytes(outlines[0])}
        polygons = [np.frombuffer(outline) for outline in outlines]
        return mask.merge(mask.frPyObjects(polygons, height, width))


def _between(ends: np.ndarray, i: int) -> tuple[int, int]:
    return (int(ends[i - 1]) if i else 0), int(ends[i])


def _run_lengths(shape: dict[str, Any], size: np.ndarray, annotation: dict[str, Any], file: Path) -> bytes:
    """COCO's compressed run lengths of an object that is no polygon."""
    if list(shape["size"]) != size.tolist():
        raise UserError(
            f"asked for the annotations in {file}, found annotation {annotation.get('id')} with a mask of height and "
            f"width {list(shape['size'])}, but its image has {size.tolist()}"
        )
    counts = shape["counts"]
    if isinstance(counts, list):
        counts = _tools(file).frPyObjects(shape, *size.tolist())["counts"]
    return counts.encode() if isinstance(counts, str) else counts
