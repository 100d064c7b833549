"""Shares of pre-training on a logarithmic axis, as one SVG that needs no library. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from _plot import COLORS, GRID, INK, MUTED

LEFT, RIGHT, TOP, STEP, WIDTH = 240, 30, 62, 20, 880
LOW, HIGH = 0.1, 20.0
"""Ends of the axis, per cent."""

Line = tuple[str, dict[str, float]]
"""A recipe, and its shares in per cent by what is counted."""


def svg(lines: Sequence[Line]) -> str:
    """One line a recipe and one mark a share; the vertical stroke is 1 %. Raises ValueError beyond the axis."""
    bottom = TOP + STEP * len(lines)
    height = bottom + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12" role="img" aria-label="share of pre-training, by recipe">'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    ]
    for percent in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20):
        x = _across(percent)
        stroke = f'stroke="{INK}" stroke-width="2"' if percent == 1 else f'stroke="{GRID}"'
        parts.append(f'<path d="M{x:.1f} {TOP - 8}V{bottom}" {stroke}/>')
        parts.append(_text(x, bottom + 16, f"{percent:g} %"))
    for number, (name, shares) in enumerate(lines):
        y = TOP + STEP * (number + 0.4)
        parts.append(_text(LEFT - 12, y + 4, name, "end", INK))
        parts += [_mark(_across(share), y, kind) for kind, share in enumerate(shares.values())]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, "share of pre-training"))
    for kind, name in enumerate(lines[0][1]):
        x = LEFT + 170 * kind
        parts += [_mark(x, 22, kind), _text(x + 12, 26, name, "start", INK)]
    return "\n".join([*parts, "</svg>\n"])


def _across(percent: float) -> float:
    if not LOW <= percent <= HIGH:
        raise ValueError(f"a share of {percent:g} % lies beyond the picture's axis, {LOW:g} to {HIGH:g} %")
    return LEFT + (WIDTH - LEFT - RIGHT) * math.log(percent / LOW) / math.log(HIGH / LOW)


def _mark(x: float, y: float, kind: int) -> str:
    """Circle, square, diamond: told apart without colours too."""
    color = COLORS[kind]
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="{color}" stroke-width="2"/>'
    if kind == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{color}"/>'
    return f'<path d="M{x:.1f} {y - 6:.1f}l5 6l-5 6l-5 -6z" fill="none" stroke="{color}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", color: str = MUTED) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
