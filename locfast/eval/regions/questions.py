"""What regions are asked: which boxes, and the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from locfast.data.labelled.split import some
from locfast.data.regions.annotated import AnnotatedBoxes
from locfast.data.sources import open_source
from locfast.data.spec import Source
from locfast.errors import UserError
from locfast.random import permute


def open_regions(val: str, images: Path | None) -> Source:
    """Annotations (.json) of COCO or LVIS, or any source of `open_source`; images: the folder of the first's images.

    Raises UserError as they do, and for a folder of images where `val` is no .json.
    """
    if val.endswith(".json"):
        return AnnotatedBoxes(Path(val).expanduser(), images)
    if images is not None:
        raise UserError(f"--image-folder {images}: only annotations (.json) need one, and --val {val} is none.")
    return open_source(val)


def choose_images(source: Source, count: int | None, seed: int) -> Tensor:
    """Places of all images of a source, or of `count` of them drawn from `seed`, in the source's order.

    Raises UserError where there are not so many.
    """
    size = len(source)
    if count is None:
        return torch.arange(size)
    if not 1 <= count <= size:
        raise UserError(f"--images {count}: there are {size} in {source!r}. Type 1 to {size}, or leave it out for all.")
    return permute(torch.arange(count), size, seed, 0, "evaluate.regions").sort().values


def class_list(source: Source, phrases: Sequence[str], file: Path | None) -> tuple[list[str], list[str]]:
    """The classes as regions have them in their phrases, and what to call each.

    Without a file: those of the annotations, or else the distinct phrases in alphabetical order. A file has a name a
    line: of annotations, what to call their classes, in order of their ids; of other sources, the phrases that are the
    classes. Raises UserError for a file that does not fit.
    """
    known = list(source.classes) if isinstance(source, AnnotatedBoxes) else None
    if file is None:
        classes = sorted(set(phrases)) if known is None else known
        return classes, classes
    names = _lines(file)
    if known is None:
        return names, names
    if len(names) != len(known):
        raise UserError(
            f"--classes {file}: it has {len(names)} lines, and {source!r} has {len(known)} classes. Give one a line, "
            "in the order of their ids."
        )
    return known, names


def number_classes(phrases: Sequence[str], classes: Sequence[str], file: Path | None) -> Tensor:
    """The class of every phrase [R] int64. Raises UserError where a phrase is none of them."""
    number: Mapping[str, int] = {name: place for place, name in enumerate(classes)}
    if unknown := sorted(set(phrases) - set(number)):
        raise UserError(
            f"--classes {file}: {len(unknown)} phrases of regions are none of its {len(classes)} classes: "
            f"{some(unknown)}. Add them, leave --classes out (then the phrases are the classes), or type "
            "--no-recognition."
        )
    return torch.tensor([number[phrase] for phrase in phrases])


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {file}: this file cannot be read ({error}). Give a name a line.") from None
    twice = [name for name in dict.fromkeys(lines) if lines.count(name) > 1]
    if twice or not lines:
        what = f"the name {twice[0]} stands there twice" if twice else "there is no name in it"
        raise UserError(f"--classes {file}: {what}. Give every class once, a name a line.")
    return lines
