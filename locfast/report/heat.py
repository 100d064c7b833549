"""Attention maps as pictures: a heat map for every head, a pixel for every patch."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from locfast.report.page import data_uri
from locfast.report.patches import photograph

STOPS = (
    (0.0, (13, 16, 36)),
    (0.35, (110, 30, 110)),
    (0.65, (214, 77, 60)),
    (0.85, (245, 165, 60)),
    (1.0, (252, 246, 190)),
)
"""From nothing to the largest: lightness rises all along, so that a grey print tells the same."""
GAP = 255
"""Level of the lines between heads."""


def heat_maps(heads: np.ndarray, name: str, label: str) -> str:
    """heads [H, rows, columns], each scaled to its own largest, side by side in a grid with a cell a head."""
    count, rows, columns = heads.shape
    across = math.ceil(math.sqrt(count * rows / columns))
    down = -(-count // across)
    canvas = np.full((down * (rows + 1) - 1, across * (columns + 1) - 1, 3), GAP, np.uint8)
    for number, one in enumerate(heads):
        top, left = number // across * (rows + 1), number % across * (columns + 1)
        canvas[top : top + rows, left : left + columns] = colours(one / max(one.max(), np.finfo(np.float32).tiny))
    height, width = canvas.shape[:2]
    drawn = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg"><image class="pixels" href="{_png(canvas)}" width="{width}" '
        f'height="{height}"/></svg>'
    )
    return f"<div>{drawn}{escape(name)}</div>"


def queried(file: Path, query: Sequence[int], grid: Sequence[int], name: str, label: str) -> str:
    """The picture with a ring around the patch `query` (row, column)."""
    from PIL import Image

    image = file.read_bytes()
    width, height = Image.open(io.BytesIO(image)).size
    tall, wide = height / grid[0], width / grid[1]
    x, y, radius = (query[1] + 0.5) * wide, (query[0] + 0.5) * tall, 0.75 * max(tall, wide)
    ring = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="none" stroke="{colour}" stroke-width="{thick:.2f}"/>'
        for colour, thick in (("#101418", 0.3 * wide), ("#ffffff", 0.15 * wide))
    )
    drawn = photograph(name, data_uri(image, lossless=max(width, height) < 100), (height, width), label)
    return f"<div>{drawn.removesuffix('</svg>')}{ring}</svg>{escape(label)}</div>"


def colours(levels: np.ndarray) -> np.ndarray:
    """Levels in 0 .. 1 [...] -> uint8 [..., 3]."""
    at, stops = np.array([place for place, _ in STOPS]), np.array([colour for _, colour in STOPS])
    return np.stack([np.interp(levels, at, channel) for channel in stops.T], -1).round().astype(np.uint8)


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return data_uri(out.getvalue(), lossless=True)
