"""Labelled images for the probe, in the layouts in which they are distributed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from locfast.data.labelled.check import check_disjoint, check_sample, read_checked
from locfast.data.labelled.instances import is_instances, open_instances
from locfast.data.labelled.panoptic import is_panoptic, open_panoptic
from locfast.data.labelled.pixel_maps import (
    is_ade20k,
    is_coco_stuff,
    is_folder,
    open_ade20k,
    open_coco_stuff,
    open_folder,
)
from locfast.data.labelled.scenes import open_scenes
from locfast.data.labelled.split import LabelledSource, LabelledSplit, Split
from locfast.errors import UserError, suggest

__all__ = [
    "LAYOUTS",
    "LabelledSource",
    "LabelledSplit",
    "check_disjoint",
    "check_sample",
    "open_labelled",
    "read_checked",
]


@dataclass(frozen=True)
class Layout:
    recognise: Callable[[Path], bool]
    open: Callable[[Path, Split], LabelledSplit]
    looks_for: str


LAYOUTS = {
    "folder": Layout(
        is_folder, open_folder, "images/train, images/val, annotations/train, annotations/val and classes.txt"
    ),
    "ade20k": Layout(
        is_ade20k, open_ade20k, "images/training, images/validation, the same in annotations, and objectInfo150.txt"
    ),
    "coco-stuff": Layout(
        is_coco_stuff, open_coco_stuff, "train2017, val2017, the same in stuffthingmaps, and labels.txt"
    ),
    "coco-panoptic": Layout(
        is_panoptic,
        open_panoptic,
        "train2017, val2017 and, in annotations, panoptic_train2017.json and the folder panoptic_train2017 (val alike)",
    ),
    "coco-instances": Layout(
        is_instances, open_instances, "train2017, val2017 and annotations/instances_train2017.json (val alike)"
    ),
}
"""Layouts by name, in the order in which they are tried."""


def open_labelled(
    data: str, split: Split, *, seed: int = 0, unlabeled: int | Literal["auto"] | None = "auto"
) -> LabelledSplit:
    """One split of the labelled data set `data`: a folder in one of LAYOUTS, or "demo" (scenes drawn from `seed`).

    Where a folder has several layouts, the first counts; `DIR::coco-panoptic` asks for one by name. `unlabeled`: the
    class id that drops out of a patch that holds any other, None for no such class. "auto" is 0 where the layout says
    so (all but "folder"); in `classes.txt` it is the line called unlabeled, unlabelled, void or background (the first
    of these names that occurs, in capitals or not), else None.
    Raises UserError for every mistake: no such folder, no known layout, images without label maps and the other way
    round, missing or damaged lists of classes, files that a JSON lists and that are absent.
    """
    opened = open_scenes(split, seed) if data == "demo" else _open(data, split)
    if unlabeled == "auto":
        return opened
    if unlabeled is not None and not 0 <= unlabeled < len(opened.classes):
        raise UserError(
            f"asked for the class {unlabeled} as the unlabeled one of {data}, found the ids 0 to "
            f"{len(opened.classes) - 1}; choose one of these, none, or auto"
        )
    return replace(opened, unlabeled=unlabeled)


def _open(data: str, split: Split) -> LabelledSplit:
    folder, separator, asked = data.rpartition("::") if "::" in data else (data, "", "")
    if separator and asked not in LAYOUTS:
        raise UserError(
            f"asked for the labelled data {data}, found no layout '{asked}'{suggest(asked, LAYOUTS)}; "
            f"behind :: stands one of {', '.join(LAYOUTS)}"
        )
    if not folder.strip():
        raise UserError(f"asked for the labelled data '{data}', found no name; give a folder, or demo")
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    if not root.is_dir():
        near = suggest(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise UserError(f"asked for the labelled data {data}, found no such folder{near}; give a folder, or demo")
    wanted = {asked: LAYOUTS[asked]} if asked else LAYOUTS
    for layout in wanted.values():
        if layout.recognise(root):
            return layout.open(root, split)
    looked_for = "; ".join(f"{layout.looks_for} ({name})" for name, layout in wanted.items())
    raise UserError(f"asked for labelled images in {data}, found no layout that is known; looked for: {looked_for}")
