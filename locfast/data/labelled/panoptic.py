"""COCO panoptic: an RGB PNG for every image, whose colours are ids of segments, and a JSON with their categories."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from locfast.data.decode import UnreadableImage
from locfast.data.decode.cpu import quietly
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


def is_panoptic(root: Path) -> bool:
    return has_json(root, "panoptic")


def open_panoptic(root: Path, split: Split) -> LabelledSplit:
    """Categories in the order of their ids become the classes 1, 2, ...; pixels of no segment are 0 = unlabeled.

    Crowd segments keep their class. Images without an annotation are left out.
    """
    file, name, images = find_json(root, "panoptic", split)
    candidates = [folder / f"panoptic_{name}" for folder in (file.parent, root)]
    maps = next((folder for folder in candidates if folder.is_dir()), None)
    if maps is None:
        raise UserError(
            f"asked for the maps of {file}, found neither of the folders {candidates[0]} and {candidates[1]}"
        )
    content = read_json(file)
    try:
        class_of, classes, things = read_categories(content, file)
        source = PanopticMaps(images, maps, file, content, class_of)
    except (KeyError, TypeError) as error:
        raise not_like_coco(file, error) from None
    return LabelledSplit(source, classes, 0, things, "coco-panoptic", root.name)


class PanopticMaps(ListedImages):
    """Annotated images of a panoptic JSON. Segments lie in arrays, 5 bytes each, which forked workers share."""

    def __init__(self, images: Path, maps: Path, file: Path, content: dict[str, Any], class_of: dict[int, int]) -> None:
        self.images, self.maps = images, maps
        name_of = {image["id"]: str(image["file_name"]) for image in content["images"]}
        annotations = content["annotations"]
        if not annotations:
            raise UserError(f"asked for the annotations in {file}, found none")
        self._names = Names(known(one["image_id"], name_of, "image", file) for one in annotations)
        self._map_names = Names(str(one["file_name"]) for one in annotations)
        segments = [segment for one in annotations for segment in one["segments_info"]]
        self._ids = np.array([segment["id"] for segment in segments], dtype=np.uint32)
        of_class = [known(segment["category_id"], class_of, "category", file) for segment in segments]
        self._classes = np.array(of_class, dtype=np.uint8)
        self._ends = np.cumsum([len(one["segments_info"]) for one in annotations])
        require_files(images, (self._names[i] for i in range(len(self))), file)
        require_files(maps, (self._map_names[i] for i in range(len(self))), file)

    def label_name(self, index: int) -> str:
        return str(self.maps / self._map_names[index])

    def read(self, index: int) -> Record:
        """Raises OSError where a file cannot be read, UnreadableImage where the map holds unlisted segments."""
        name, file = self.name(index), Path(self.label_name(index))
        part = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        ids = _segment_ids(file.read_bytes())
        label_map = encode_label_map(_classes_of(ids, self._ids[part], self._classes[part]))
        return Record(Path(name).read_bytes(), name, label_map=label_map)


@quietly
def _segment_ids(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    if image.mode != "RGB":
        raise UnreadableImage(f"a panoptic map needs RGB pixels, found mode {image.mode}")
    red, green, blue = np.moveaxis(np.asarray(image).astype(np.uint32), -1, 0)
    return red + (green << 8) + (blue << 16)


def _classes_of(ids: np.ndarray, segments: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The classes [H, W] uint8 of segment ids [H, W]; looked up once a run of equal pixels, of which there are few."""
    flat = ids.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    asked = flat[starts]
    order = np.argsort(np.append(segments, 0), kind="stable")
    table, values = np.append(segments, 0)[order], np.append(classes, 0)[order]
    place = np.searchsorted(table, asked).clip(max=len(table) - 1)
    if not (table[place] == asked).all():
        unknown = int(asked[table[place] != asked][0])
        raise UnreadableImage(f"the map holds the segment {unknown}, which the JSON does not list for it")
    lengths = np.diff(np.append(starts, flat.size))
    return np.repeat(values[place], lengths).astype(np.uint8).reshape(ids.shape)
