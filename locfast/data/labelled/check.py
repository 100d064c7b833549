"""Whether labelled data is what it should be: one sample at a time, and two splits against each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from locfast.data.decode import UnreadableImage
from locfast.data.decode.cpu import CpuPicture, decode_label_map
from locfast.data.labelled.split import LabelledSplit, encode_label_map, some
from locfast.data.spec import Record
from locfast.errors import UserError

IGNORE = 255
JPEG = b"\xff\xd8"


def check_sample(split: LabelledSplit, index: int) -> None:
    """Raises as `read_checked` does."""
    read_checked(split, index)


def read_checked(split: LabelledSplit, index: int) -> Record:
    """A sample whose label map fits its image and its classes; the map as a raw PGM file, so that it is decoded once.

    Raises UserError, which names both files, where one of them cannot be read, where the map has another size than the
    upright image, is not 8 bits of one channel (or a palette), or holds ids that are no class and not 255.
    """
    source = split.source
    names = f"the image {source.name(index)} and its label map {source.label_name(index)}"
    try:
        record = source.read(index)
        assert record.label_map is not None
        image_size = CpuPicture(record.image).size
        if record.label_map.startswith(JPEG):
            raise UnreadableImage("the map is a JPEG, which changes ids at the borders of things")
        label_map = decode_label_map(record.label_map)
    except OSError as error:
        raise UserError(f"asked for {names}, found one that cannot be read: {error}") from None
    except UnreadableImage as error:
        raise UserError(
            f"asked for {names}, found one that cannot be used: {error}. A label map is a file without loss (PNG) of "
            "8 bits, one channel or a palette, with one class id per pixel and 255 where there is none"
        ) from None
    if label_map.shape != image_size:
        raise UserError(
            f"asked for {names}, found {_size(image_size)} pixels in the image (upright, as EXIF has it) and "
            f"{_size(label_map.shape)} in the map; they must agree: make the map of the upright image, at its size"
        )
    shift = getattr(source, "shift", 0)  # told in the values of the file
    allowed = {(id - shift) % 256 for id in range(len(split.classes))} | {IGNORE}
    found = np.unique(label_map - np.uint8(shift)).tolist()
    if wrong := [id for id in found if id not in allowed]:
        raise UserError(
            f"asked for {names}, found the ids {some([str(id) for id in wrong])} in the map, which are no classes: "
            f"{split.name} has {len(split.classes)}, so the ids 0 to {len(split.classes) - 1 - shift}, and 255 where "
            "there is none, are allowed; mend the map, or add the classes"
        )
    return replace(record, label_map=encode_label_map(label_map))


def check_disjoint(train: LabelledSplit, validation: LabelledSplit) -> None:
    """Raises UserError where both splits have an image of the same name (within the split, folders included)."""
    ours = {train.source.file_name(i) for i in range(len(train.source))}
    both = [i for i in range(len(validation.source)) if validation.source.file_name(i) in ours]
    if both:
        raise UserError(
            f"asked for a training and a validation split without common images, found {len(both)} of the same name in "
            f"{train.source!r} and {validation.source!r}: {some([validation.source.name(i) for i in both])}. "
            "Figures on images that were trained on mean nothing: take them out of one split, or, if these are other "
            "images, give them other names"
        )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
