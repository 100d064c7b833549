"""Labels by eye: boxes and phrases on the images they were found in, on one page that loads nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from locfast.data.spec import Region
from locfast.report.page import data_uri, fold, page, paragraph, section, table, tiles

SIDE = 480
"""Pixels of the longer side of a picture: a photograph takes some 50 kB."""
COLOURS = ((0.0, "#5ab4ff"), (0.2, "#ffd23f"), (0.35, "#ff8a3d"), (0.5, "#ff4f8b"))
"""From which score on a box has which colour: light enough for dark photographs, outlined for light ones."""
LONG = 200
"""Letters of a caption that are shown at once: three lines or so below a picture."""
LETTER = 0.56
"""Width of a letter by its height, about: for the plate behind a phrase."""


@dataclass(frozen=True)
class Picture:
    """One sample."""

    name: str
    pixels: np.ndarray  # uint8 RGB [height, width, 3], upright
    texts: tuple[str, ...]
    regions: tuple[Region, ...]


def labels_page(title: str, source: str, pictures: Sequence[Picture], total: int) -> str:
    """A whole page; `total`: samples that the pictures are taken from."""
    found = [region for one in pictures for region in one.regions]
    words = [len(region.text.split()) for region in found]
    head = tiles(
        [
            ("Pictures", f"{len(pictures)}", f"of {total}, evenly spread"),
            ("Regions an image", f"{len(found) / max(1, len(pictures)):.1f}", "on these pictures"),
            ("Words a region", f"{np.mean(words):.1f}" if words else "-", "on these pictures"),
            ("Score", f"{np.median([r.score for r in found]):.2f}" if found else "-", "median of these regions"),
        ]
    )
    blocks = "".join(_block(one) for one in pictures)
    told = paragraph(
        "Every box with the phrase that the detector matched it with, coloured by its score. What to look for: boxes "
        "around something else than their phrase says, things in a caption that no box shows, and one object under "
        "many boxes."
    )
    shown = section("Pictures", told, _legend(), f'<div class="figures">{blocks}</div>')
    return page(title, "labels", paragraph(source, "lede") + head, [shown])


def _block(one: Picture) -> str:
    rows = [
        (region.text, f"{region.score:.2f}", " ".join(f"{edge:.0f}" for edge in region.box)) for region in one.regions
    ]
    numbers = table(f"Regions of {one.name}", ("phrase", "score", "box"), rows) if rows else ""
    texts = "".join(_text(text) for text in one.texts)
    count = f"{len(rows)} region{'' if len(rows) == 1 else 's'}"
    return (
        f"<figure>{_drawing(one)}<figcaption>{texts}<span>{escape(one.name)}: {count}</span></figcaption>"
        f"{fold('All regions', numbers)}</figure>"
    )


def _text(text: str) -> str:
    """A long caption, such as an alt-text of many sentences, shows its beginning and unfolds."""
    if len(text) <= LONG:
        return paragraph(text)
    return fold(text[:LONG].rsplit(" ", 1)[0] + " ...", paragraph(text))


def _drawing(one: Picture) -> str:
    height, width = one.pixels.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    image = Image.fromarray(one.pixels).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    file = io.BytesIO()
    image.save(file, "PNG")
    # in the units of the image itself, whatever its size: lines and letters are shares of its width
    line, letter = width / 240, width / 26
    # the least sure first, so that the surest lie on top
    marks = [_mark(region, (height, width), line, letter) for region in sorted(one.regions, key=lambda r: r.score)]
    uri = data_uri(file.getvalue(), lossless=max(image.size) < 100)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="group" aria-label="{escape(one.name)}" width="100%" '
        f'xmlns="http://www.w3.org/2000/svg"><image href="{uri}" width="{width}" height="{height}"/>'
        f"{''.join(marks)}</svg>"
    )


def _mark(region: Region, size: tuple[int, int], line: float, letter: float) -> str:
    left, top, right, bottom = region.box
    colour = _colour(region.score)
    box = f'x="{left:.1f}" y="{top:.1f}" width="{max(0, right - left):.1f}" height="{max(0, bottom - top):.1f}"'
    said = escape(f"{region.text}, {region.score:.2f}")
    wide = LETTER * letter * len(region.text)
    x = max(0.0, min(left, size[1] - wide))
    y = max(0.0, min(top, size[0] - 1.3 * letter))
    return (
        f'<g class="mark" tabindex="-1" role="img" aria-label="{said}"><title>{said}</title>'
        f'<rect {box} fill="none" stroke="#101418" stroke-width="{2 * line:.2f}" opacity=".55"/>'
        f'<rect {box} fill="transparent" stroke="{colour}" stroke-width="{line:.2f}"/>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{1.3 * letter:.1f}" fill="{colour}" opacity=".85"/>'
        f'<text x="{x + 0.2 * letter:.1f}" y="{y + letter:.1f}" fill="#101418" textLength="{wide - 0.4 * letter:.1f}" '
        f'lengthAdjust="spacingAndGlyphs" style="font-size:{letter:.2f}px">{escape(region.text)}</text></g>'
    )


def _colour(score: float) -> str:
    return next(colour for least, colour in reversed(COLOURS) if score >= least or least == 0)


def _legend() -> str:
    ends = [*(f"below {least:g}" for least, _ in COLOURS[1:]), f"{COLOURS[-1][0]:g} and more"]
    items = "".join(
        f'<li><span class="swatch" style="background:{colour}"></span>{escape(end)}</li>'
        for (_, colour), end in zip(COLOURS, ends, strict=True)
    )
    return f'<ul class="legend">{items}</ul>'
