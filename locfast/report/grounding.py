"""Pictures of the demo's scenes with the boxes that a model gave for phrases, and the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from locfast.report.page import data_uri, paragraph, section

COLOURS = ("#56b4e9", "#e69f00", "#cc79a7", "#f4f1ea")
"""One a phrase of a scene; none is a colour of the scenes."""


def boxes_of_phrases(scenes: Sequence[dict[str, Any]], stream: int) -> str:
    """A section with every scene (its number in the stream, and what was asked), its boxes drawn over it."""
    from locfast.data.scenes import SIZE, SceneSource

    if not scenes:
        return ""
    source = SceneSource(1 + max(one["scene"] for one in scenes), seed=stream)
    blocks = []
    for one in scenes:
        number, drawn, keys = one["scene"], [], []
        for asked, colour in zip(one["asked"], COLOURS, strict=False):
            told = f"{asked['phrase']}: IoU {asked['iou']:.2f}"
            rectangles = _rectangle(asked["truth"], SIZE, colour, ' stroke-dasharray="1.6 1.2"')
            rectangles += _rectangle(asked["box"], SIZE, colour)
            words = escape(told)
            drawn.append(f'<g class="mark" tabindex="-1" role="img" aria-label="{words}"><title>{words}</title>'
                         f"{rectangles}</g>")  # fmt: skip
            swatch = '<svg class="key" width="14" height="14" viewBox="0 0 14 14" aria-hidden="true">'
            keys.append(f'<li>{swatch}<rect width="14" height="14" rx="3" fill="{colour}"/></svg>{words}</li>')
        uri = data_uri(source.read(number).image, lossless=True)
        blocks.append(
            f'<figure><svg viewBox="0 0 {SIZE} {SIZE}" role="group" aria-label="scene {number} with boxes" '
            f'xmlns="http://www.w3.org/2000/svg"><image class="pixels" href="{uri}" width="{SIZE}" height="{SIZE}"/>'
            f'{"".join(drawn)}</svg><ul class="legend">{"".join(keys)}</ul></figure>'
        )
    return section(
        "Where a phrase is",
        paragraph(
            "The box that the model gives for each phrase (whole line) and the true one (dashed): the first held-out "
            "scenes with two objects or more that each have a phrase of their own."
        ),
        f'<div class="pictures small">{"".join(blocks)}</div>',
    )


def _rectangle(box: Sequence[float], size: int, colour: str, more: str = "") -> str:
    left, top, right, bottom = (size * side for side in box)
    width, height = max(0.0, right - left), max(0.0, bottom - top)
    return (
        f'<rect x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height:.2f}" fill="none" '
        f'stroke="{colour}" stroke-width=".8"{more}/>'
    )
