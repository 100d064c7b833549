"""A labelled split as a probe sees it: whole and upright, in a fixed order, every image or none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locfast.data.labelled import LabelledSplit, read_checked
from locfast.data.loader import Loader
from locfast.data.spec import ImageSpec, Record, View
from locfast.errors import UserError

EPOCH = 0
"""Nothing is drawn: the view is the largest centre square."""
NAMED = 5
"""Bad files that a message lists."""


class Checked:
    """A labelled source that raises for a label map of the wrong size, or with ids that are no class."""

    def __init__(self, split: LabelledSplit) -> None:
        self.split, self.source = split, split.source

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, index: int) -> Record:
        return read_checked(self.split, index)


@dataclass(frozen=True)
class Batch:
    """Images in their order: rows [B] of the split, pixels [B, 3, H, W] normalised and label maps [B, H, W]."""

    rows: Tensor
    pixels: Tensor
    label_map: Tensor


class Images:
    """The largest centre square of every image of a split, at the backbone's size."""

    def __init__(self, split: LabelledSplit, view: View, device: torch.device, workers: int | None, limit: int | None):
        self.split, self.view, self.device, self.workers = split, view, device, workers
        self.count = min(len(split.source), limit or len(split.source))

    def __len__(self) -> int:
        return self.count

    def batches(self, rows: Iterable[Tensor]) -> Iterator[Batch]:
        """Batches of the images `rows` [B] int64. Raises UserError where one of them cannot be read."""
        spec = ImageSpec({"image": self.view}, label_map=True)
        loader = Loader(Checked(self.split), spec, seed=0, workers=self.workers, device=self.device, decoder="cpu")
        for batch in loader.sequential(EPOCH, rows):
            if bad := loader.replaced.names:
                listed = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:NAMED])
                raise UserError(f"the probe needs every image of {self.split.name} and its label map. {listed}")
            yield Batch(batch["position"], batch["views"]["image"], batch["label_map"]["image"])

    def key(self) -> str:
        """Changes with the list of files (COCO's JSON is one), their sizes and the times of their last change."""
        told = hashlib.sha256(
            json.dumps([self.split.layout, *self.split.classes, repr(self.view), self.count]).encode()
        )
        source = self.split.source
        # COCO's classes follow from a JSON that lists all images; a panoptic map alone does not tell them.
        _tell(told, *([str(source.file)] if hasattr(source, "file") else []))
        for row in range(self.count):
            _tell(told, source.name(row), source.label_name(row))
        return told.hexdigest()[:16]


def _tell(digest: Any, *files: str) -> None:
    """Path, size and time of files; of names that are no file (scenes, objects in a JSON), the name."""
    for file in files:
        digest.update(file.encode())
        if os.path.exists(file):
            stat = os.stat(file)
            digest.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())


def whole_view(size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], interpolation: str) -> View:
    """The largest centre square, resized: what the public reference probes on."""
    return View(size, mean, std, crop="center", crop_pct=1.0, interpolation=interpolation)  # type: ignore[arg-type]
