"""Class folders: `ROOT/CLASS/.../image.jpg`, the layout of ImageNet and of torchvision's ImageFolder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from locfast.data.sources.folder import ImageFolder, is_image, walk_images
from locfast.data.sources.names import Names
from locfast.errors import UserError, suggest

NAMED = 5
"""Folders that an error names."""


class ClassFolder(ImageFolder):
    """Every image below the sub-folders of a folder; a sub-folder is a class, and they are numbered in sorted order.

    `classes` are the sub-folders' names, `labels` [M] the class of every image. Hidden folders and images beside the
    sub-folders are left out. Raises UserError where there is no such folder, fewer than two classes, or a class
    without an image.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.classes = _sub_folders(self.root)
        counts: list[int] = []
        self.names = Names(self._walk(counts))
        if empty := [name for name, count in zip(self.classes, counts, strict=True) if not count]:
            raise UserError(
                f"asked for the class folders in {root}, found {len(empty)} of {len(counts)} without an image: "
                f"{_some(empty)}; every sub-folder is a class: fill them, or take them away"
            )
        self.labels = np.repeat(np.arange(len(counts)), counts)

    def _walk(self, counts: list[int]) -> Iterator[str]:
        for name in self.classes:
            counts.append(0)
            for image in walk_images(self.root / name):
                counts[-1] += 1
                yield f"{name}/{image}"

    def readable_names(self, file: str | Path | None = None) -> dict[str, str]:
        """What to call the classes, by sub-folder, from a file; {} where there is none.

        file: `.json`, {"sub-folder": "name"}, or `.txt`, a name a line in the sorted order of the sub-folders; None:
        ROOT/classes.json or ROOT/classes.txt. Raises UserError where it does not name every class.
        """
        if file is None:
            found = [path for kind in ("json", "txt") if (path := self.root / f"classes.{kind}").is_file()]
            if not found:
                return {}
            file = found[0]
        path = Path(file)
        try:
            text = path.read_text(encoding="utf-8")
            names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.strip().splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(
                f"asked for the class names in {path}, which cannot be read ({error}); give a .json with "
                '{"sub-folder": "name"}, or a .txt with a name a line'
            ) from None
        if isinstance(names, list):
            if len(names) != len(self.classes):
                raise UserError(
                    f"asked for the class names in {path}, found {len(names)} lines for the {len(self.classes)} "
                    f"sub-folders of {self.root}; give one name a line, in the sorted order of the sub-folders"
                )
            names = dict(zip(self.classes, names, strict=True))
        bad = [name for name in self.classes if not isinstance(names, dict) or not isinstance(names.get(name), str)]
        if bad:
            raise UserError(
                f'asked for the class names in {path}, found none for {_some(bad)}; give {{"sub-folder": "name"}} for '
                f"every sub-folder of {self.root}"
            )
        return {name: names[name] for name in self.classes}

    def __repr__(self) -> str:
        return f"{len(self)} images of {len(self.classes)} classes in {self.root}"


def check_same_classes(train: ClassFolder, val: ClassFolder) -> None:
    """Raise UserError unless both have the same classes, naming those that only one of them has."""
    only = [
        (one.root, [n for n in one.classes if n not in set(other.classes)])
        for one, other in ((train, val), (val, train))
    ]
    told = [f"only in {root}: {_some(names)} ({len(names)})" for root, names in only if names]
    if told:
        raise UserError(
            f"asked to compare the class folders {train.root} and {val.root}, found other classes in one than in the "
            f"other; {'; '.join(told)}. Both need the same sub-folders"
        )


def _sub_folders(root: Path) -> tuple[str, ...]:
    layout = "class folders are ROOT/CLASS/image.jpg, one sub-folder a class, two of them at least"
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except FileNotFoundError:
        near = suggest(root.name, os.listdir(root.parent)) if root.parent.is_dir() else ""
        raise UserError(f"asked for the class folders in {root}, found no such folder{near or '; ' + layout}") from None
    except OSError as error:
        raise UserError(
            f"asked for the class folders in {root}, found what cannot be read ({error.strerror}); {layout}"
        ) from None
    folders = tuple(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if len(folders) < 2:
        loose = sum(is_image(entry.name) for entry in entries)
        found = f"the one sub-folder {folders[0]}" if folders else "no sub-folder"
        found += f" and {loose} images beside" * bool(loose)
        raise UserError(f"asked for the class folders in {root}, found {found}; {layout}")
    return folders


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
