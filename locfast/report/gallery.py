"""Pictures of a probe or a comparison: the photograph, the truth, and what each backbone's patches are taken for."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path

from locfast.report.page import data_uri, paragraph, section
from locfast.report.patches import colors, key, patch_map, photograph, wrong_patches

SHOWN = 12
"""Pictures of a report: one of 336 px takes about 100 kB."""


@dataclass(frozen=True)
class Shown:
    """One picture: its file, and by backbone its grid, truth and answers (the likeliest class of every patch)."""

    name: str
    file: Path
    grids: Mapping[str, tuple[int, int]]
    truth: Mapping[str, Sequence[Sequence[int]]]
    answers: Mapping[str, Sequence[int]]


def gallery(pictures: Sequence[Shown], classes: Sequence[str], head: str) -> str:
    """A section with at most `SHOWN` pictures whose files are there; nothing where none is."""
    from PIL import Image

    there = [one for one in pictures if one.file.is_file()][:SHOWN]
    seen = [
        [*chain(*one.answers.values()), *(k for truth in one.truth.values() for k in chain(*truth))] for one in there
    ]
    blocks = []
    for number, (one, paint) in enumerate(zip(there, colors(seen), strict=True)):
        image = one.file.read_bytes()
        width, height = Image.open(io.BytesIO(image)).size
        size, name = (height, width), f"picture-{number}"
        uri = data_uri(image, lossless=max(size) < 100)
        cells = [f"<div>{photograph(name, uri, size, one.name)}{escape(one.name)}</div>"]
        first = next(iter(one.grids))
        about = (size, paint, classes)
        truth = patch_map(name, one.truth[first], one.truth[first], one.grids[first], *about, f"{one.name}: truth")
        cells.append(f"<div>{truth}truth</div>")
        for model, answers in one.answers.items():
            told = [[k] for k in answers]
            drawn = patch_map(name, told, one.truth[model], one.grids[model], *about, f"{one.name}: {model}")
            wrong, known = wrong_patches(answers, one.truth[model])
            cells.append(f"<div>{drawn}{escape(model)}: {wrong} of {known} wrong</div>")
        blocks.append(f'<figure><div class="maps">{"".join(cells)}</div>{key(paint, classes)}</figure>')
    if not blocks:
        return ""
    return section(
        "What every patch is taken for",
        paragraph(
            f"The likeliest class of every patch by the {head.replace('/', ', ')} head. A cross marks a class that is "
            "not in the patch. Where the truth has several classes, they share the patch."
        ),
        f'<div class="pictures">{"".join(blocks)}</div>',
    )
