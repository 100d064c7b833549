"""Layouts with one file of class ids beside every image: the plain folder, ADE20k and COCO-Stuff."""

from __future__ import annotations

import re
from pathlib import Path

from locfast.data.labelled.pairs import LabelledPairs
from locfast.data.labelled.split import LabelledSplit, Split, count_classes
from locfast.errors import UserError

FOLDER_SPLITS = {"train": ("train",), "validation": ("val", "validation")}
ADE20K_SPLITS = {"train": "training", "validation": "validation"}
COCO_SPLITS = {"train": ("train2017", "train2014", "train"), "validation": ("val2017", "val2014", "val")}
COCO_STUFF_CLASSES = 183
COCO_STUFF_THINGS = frozenset(range(1, 92))
UNLABELED_NAMES = ("unlabeled", "unlabelled", "void", "background")


def is_folder(root: Path) -> bool:
    if (root / "images" / "training").is_dir():  # ADE20k, which has images/validation too
        return False
    splits = [split for names in FOLDER_SPLITS.values() for split in names]
    return any((root / "images" / split).is_dir() and (root / "annotations" / split).is_dir() for split in splits)


def open_folder(root: Path, split: Split) -> LabelledSplit:
    """`images/<split>`, `annotations/<split>` and `classes.txt`."""
    wanted = FOLDER_SPLITS[split]
    found = next((name for name in wanted if (root / "images" / name).is_dir()), wanted[0])
    classes = _read_classes(root / "classes.txt")
    names = [name.casefold() for name in classes]
    unlabeled = next((names.index(name) for name in UNLABELED_NAMES if name in names), None)
    source = LabelledPairs(_there(root / "images" / found), _there(root / "annotations" / found))
    return LabelledSplit(source, classes, unlabeled, None, "folder", root.name)


def is_ade20k(root: Path) -> bool:
    return all((root / kind / "training").is_dir() for kind in ("images", "annotations"))


def open_ade20k(root: Path, split: Split) -> LabelledSplit:
    """ADEChallengeData2016 as it is distributed: 150 classes behind 0 = unlabeled."""
    folder, file = ADE20K_SPLITS[split], root / "objectInfo150.txt"
    lines = _lines(file, "comes with ADE20k (ADEChallengeData2016)")
    head, *rows = [line.split("\t") for line in lines] or [[]]
    columns = {name.strip(): i for i, name in enumerate(head)}
    try:
        names = [row[columns["Name"]].strip() for row in rows]
        numbers = [int(row[columns["Idx"]]) for row in rows]
        counted = [row[columns["Stuff"]].strip() == "0" for row in rows] if "Stuff" in columns else None
    except (KeyError, IndexError, ValueError):
        names, numbers, counted = [], [], None
    if not names or numbers != list(range(1, len(names) + 1)):
        raise UserError(
            f"asked for the classes in {file}, found no table of them; it needs a first line Idx, Ratio, Train, Val, "
            "Stuff, Name, separated by tabs, and then one line a class, numbered from 1"
        )
    short = [name.split(",")[0].split(";")[0] for name in names]  # the first of several synonyms
    classes = [one if short.count(one) == 1 else name for one, name in zip(short, names, strict=True)]
    things = None if counted is None else frozenset(i + 1 for i, thing in enumerate(counted) if thing)
    source = LabelledPairs(_there(root / "images" / folder), _there(root / "annotations" / folder))
    return LabelledSplit(source, count_classes(("unlabeled", *classes), file), 0, things, "ade20k", root.name)


def is_coco_stuff(root: Path) -> bool:
    return any(_stuff_folders(root, name) for names in COCO_SPLITS.values() for name in names)


def open_coco_stuff(root: Path, split: Split) -> LabelledSplit:
    """COCO-Stuff's maps hold 0 .. 181, and 255 for unlabeled: one more, modulo 256, is the class id."""
    found = next((folders for name in COCO_SPLITS[split] if (folders := _stuff_folders(root, name))), None)
    if found is None:
        raise UserError(
            f"asked for the {split} split of COCO-Stuff in {root}, found no pair of folders like "
            f"{COCO_SPLITS[split][0]} and stuffthingmaps/{COCO_SPLITS[split][0]}; put images and maps there"
        )
    files = [file for file in (root / "labels.txt", root / "stuffthingmaps" / "labels.txt") if file.is_file()]
    file = files[0] if files else root / "labels.txt"
    hint = "comes with COCO-Stuff: '0: unlabeled', '1: person' and so on, one class a line"
    matches = [re.fullmatch(r"(\d+)\s*:\s*(\S.*)", line) for line in _lines(file, hint)]
    if [int(m[1]) for m in matches if m] != list(range(COCO_STUFF_CLASSES)) or None in matches:
        raise UserError(
            f"asked for the classes in {file}, found something else than the {COCO_STUFF_CLASSES} lines "
            "'0: unlabeled', '1: person' .. '182: ...' in the order of their ids, as COCO-Stuff has them"
        )
    classes = tuple(m[2] for m in matches if m)
    return LabelledSplit(LabelledPairs(*found, shift=1), classes, 0, COCO_STUFF_THINGS, "coco-stuff", root.name)


def find_coco_images(root: Path, name: str) -> Path | None:
    """The folder of images of COCO's split `name` (train2017)."""
    return next((folder for folder in (root / name, root / "images" / name) if folder.is_dir()), None)


def _stuff_folders(root: Path, name: str) -> tuple[Path, Path] | None:
    images = find_coco_images(root, name)
    maps = next((f for kind in ("stuffthingmaps", "annotations") if (f := root / kind / name).is_dir()), None)
    return (images, maps) if images and maps else None


def _there(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(
            f"asked for labelled images in {folder.parent.parent}, found no folder {folder}; images/ and annotations/ "
            f"must lie side by side and both have it inside{_beside(folder)}"
        )
    return folder


def _beside(folder: Path) -> str:
    others = sorted(one.name for one in folder.parent.iterdir() if one.is_dir()) if folder.parent.is_dir() else []
    return f" (there are {', '.join(others)})" if others else ""


def _read_classes(file: Path) -> tuple[str, ...]:
    names = _lines(file, "names the classes: one a line, that of id 0 first, e.g. 'unlabeled', 'sky', 'road'")
    if "" in names:
        raise UserError(
            f"asked for the classes in {file}, found line {names.index('') + 1} empty; line 1 names the id 0, "
            "line 2 the id 1 and so on: write a name there"
        )
    return count_classes(tuple(names), file)


def _lines(file: Path, what: str) -> list[str]:
    """The lines of a file of class names, without blanks around them and without empty ones at the end."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"asked for the classes in {file}, found no such file ({error.strerror}); it {what}") from None
    except UnicodeDecodeError:
        raise UserError(f"asked for the classes in {file}, found bytes that are not UTF-8; it {what}") from None
    return [line.strip() for line in text.rstrip().splitlines()]
