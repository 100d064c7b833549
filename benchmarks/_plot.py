"""Curves in panels side by side, both axes logarithmic, as one SVG that needs no library. Standard library only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from _results import Row

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 560, 380, 64, 34, 46, 190
COLORS = ("#0f8b6d", "#c2571a", "#3b6fb6", "#8a4fb0", "#b03a5b", "#7a7a1c", "#2b9fb0", "#5b6470")
INK, MUTED, GRID = "#1d2733", "#6b7785", "#e3e8ee"

Curves = dict[str, list[tuple[int, float]]]
"""Points by implementation, e.g. (tokens, microseconds for one head of one image)."""


def write(rows: Sequence[Row], path: Path, head_dim: int = 64) -> bool:
    """Time against tokens, forward and backward; False, and no file, where nothing was measured."""
    panels = {f"{way}, D {head_dim}": curves(rows, way, head_dim) for way in ("forward", "backward")}
    about = f"time against tokens, D {head_dim}"
    return draw(panels, path, about, across="tokens", up="microseconds for a head of an image")


def draw(panels: Mapping[str, Curves], path: Path, about: str, across: str, up: str) -> bool:
    """Two panels by their titles, what is along their axes, and what the whole is about; False where all are empty."""
    names = sorted({name for panel in panels.values() for name in panel}, key=lambda name: (_is_peer(name), name))
    if not names:
        return False
    total = 2 * WIDTH + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {HEIGHT}" width="{total}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(about)}">'
        f'<rect width="{total}" height="{HEIGHT}" fill="#fff"/>'
    ]
    for number, (title, panel) in enumerate(panels.items()):
        parts += _panel(title, panel, names, number * WIDTH, across, up)
    for number, name in enumerate(names):
        y = TOP + 18 * number
        parts.append(_text(2 * WIDTH + 24, y + 4, name, "start", INK))
        parts.append(f'<path d="M{2 * WIDTH} {y}h18" {_stroke(name, number)}/>')
    parts.append("</svg>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))
    return True


def curves(rows: Sequence[Row], direction: str, head_dim: int) -> Curves:
    """What to draw: batches and heads differ between cases, so time is per head of an image."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.ms is not None and row.direction == direction and row.shape.get("D") == head_dim:
            found[row.who][row.shape["T"]] = 1e3 * row.ms / (row.shape["B"] * row.shape["H"])
    return {who: sorted(points.items()) for who, points in found.items()}


def _panel(title: str, panel: Curves, names: Sequence[str], left: float, along: str, height: str) -> list[str]:
    points = [point for curve in panel.values() for point in curve]
    parts = [_text(left + LEFT, TOP - 14, title, "start", INK)]
    if not points:
        return [*parts, _text(left + WIDTH / 2, HEIGHT / 2, "not measured")]
    across = _Axis([p[0] for p in points], left + LEFT, left + WIDTH - 24)
    up = _Axis([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    free_from = -math.inf
    for value in sorted({p[0] for p in points}):
        x = across(value)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
        if x >= free_from:
            parts.append(_text(x, HEIGHT - BOTTOM + 16, str(value)))
            free_from = x + 32
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<path d="M{left + LEFT} {y:.1f}H{left + WIDTH - 24}" stroke="{GRID}"/>')
        parts.append(_text(left + LEFT - 8, y + 4, f"{tick:g}", "end"))
    for number, name in enumerate(names):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in panel.get(name, ()))
        parts.append(f'<polyline points="{path}" fill="none" {_stroke(name, number)}/>')
    parts.append(_text(left + (LEFT + WIDTH) / 2, HEIGHT - 8, along))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    label = _text(left + 14, middle, height)
    parts.append(f'<g transform="rotate(-90 {left + 14} {middle})">{label}</g>')
    return parts


class _Axis:
    """Places values on a logarithmic axis between two pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        self.low, self.high, self.start, self.end = min(values), max(values), start, end

    def __call__(self, value: float) -> float:
        span = math.log(self.high / self.low) or 1.0
        return self.start + (self.end - self.start) * math.log(value / self.low) / span

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten within the axis."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        return [value for value in found if self.low <= value <= self.high]


def _is_peer(name: str) -> bool:
    return not name.startswith("locfast")


def _stroke(name: str, number: int) -> str:
    width = 1.5 if _is_peer(name) else 3
    dashes = ' stroke-dasharray="5 4"' if "no cap" in name else ""
    if number >= len(COLORS):  # colours come round again
        dashes = ' stroke-dasharray="1 3"'
    return f'stroke="{COLORS[number % len(COLORS)]}" stroke-width="{width}"{dashes}'


def _text(x: float, y: float, text: str, anchor: str = "middle", color: str = MUTED) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
