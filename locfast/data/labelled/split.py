"""What the probe needs of labelled images: samples with label maps, and what their ids mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from locfast.data.sources.names import Names
from locfast.data.spec import Source
from locfast.errors import UserError

Split = Literal["train", "validation"]
MAX_CLASSES = 255
"""Label maps have 8 bits, of which 255 says that a pixel counts for nothing."""


class LabelledSource(Source, Protocol):
    """A source whose records all have a label map: 8 bits, one channel, 255 = ignore."""

    def name(self, index: int) -> str:
        """The image's path, or what a log calls it."""

    def label_name(self, index: int) -> str:
        """Where its label map comes from."""

    def file_name(self, index: int) -> str:
        """The image's name within its split, which tells whether two splits have it in common."""


class ListedImages:
    """The images of a source by a list of their names within a folder; `_names` is set by whoever makes the list."""

    images: Path
    _names: Names

    def __len__(self) -> int:
        return len(self._names)

    def file_name(self, index: int) -> str:
        return self._names[index]

    def name(self, index: int) -> str:
        return str(self.images / self._names[index])

    def __repr__(self) -> str:
        return f"{len(self)} labelled images in {self.images}"


@dataclass(frozen=True)
class LabelledSplit:
    """One split of a labelled data set."""

    source: LabelledSource
    classes: tuple[str, ...]
    """Name by id."""
    unlabeled: int | None
    """The class that drops out of a patch that holds any other class (COCO-Stuff and ADE20k: 0), or None."""
    things: frozenset[int] | None
    """Ids of countable classes where the data says which these are, else None."""
    layout: str
    """folder, ade20k, coco-stuff, coco-panoptic, coco-instances or scenes."""
    name: str
    """A short name for tables."""


def count_classes(names: tuple[str, ...], file: object) -> tuple[str, ...]:
    """`names`, unless there are none or more than a label map can tell apart: then UserError, which names `file`."""
    if not 0 < len(names) <= MAX_CLASSES:
        raise UserError(
            f"asked for the classes of {file}, found {len(names)} (id 0 included); label maps have 8 bits, so there "
            f"must be 1 to {MAX_CLASSES}"
        )
    return names


def encode_label_map(ids: np.ndarray) -> bytes:
    """Class ids [H, W] uint8 as a raw PGM file, which takes a copy to write and to read."""
    height, width = ids.shape
    return b"P5 %d %d 255\n" % (width, height) + ids.tobytes()


def some(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
