"""Small charts as inline SVG, for reports that are one file and load nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from locfast.data.scenes import COLORS, PAIRS

INK, MUTED, GRID = "#1d2733", "#6b7785", "#e3e8ee"
BEFORE, AFTER = "#9aa7b5", "#0f8b6d"


def line_chart(series: dict[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Curves of (x, y) points on a logarithmic y axis where values span more than a decade."""
    points = [p for curve in series.values() for p in curve if math.isfinite(p[1])]
    if not points:
        return ""
    width, height, left, right, top, bottom = 720, 300, 60, 16, 16, 44
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    log = min(ys) > 0 and max(ys) / min(ys) > 10
    scale = math.log10 if log else float
    low, high = scale(min(ys)), scale(max(ys))
    high = high if high > low else low + 1
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - first) / (last - first) * (width - left - right)
        return across, top + (high - scale(y)) / (high - low) * (height - top - bottom)

    parts = [_open(width, height, f"{y_label} against {x_label}")]
    for i in range(5):
        value = low + (high - low) * i / 4
        y = top + (high - value) / (high - low) * (height - top - bottom)
        shown = f"{10**value if log else value:.3g}"
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(_text(left - 8, y + 4, shown, anchor="end"))
        x = first + (last - first) * i / 4
        across = left + (width - left - right) * i / 4
        parts.append(_text(across, height - bottom + 18, f"{x:.0f}"))
    palette = (AFTER, "#c2571a", "#3b6fb6", "#8a4fb0")
    for number, (name, curve) in enumerate(series.items()):
        color = palette[number % len(palette)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in curve if math.isfinite(y)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(_text(width - right - 4, top + 14 + 18 * number, name, anchor="end", color=color))
    parts.append(_text((left + width) / 2, height - 6, x_label))
    parts.append("</svg>")
    return "".join(parts)


def bar_chart(rows: Sequence[tuple[str, float, float]]) -> str:
    """Pairs of bars, before and after, for values in 0 .. 1 shown as percent: (label, before, after)."""
    width, left, right, row = 720, 190, 120, 58
    height = row * len(rows) + 24
    full = width - left - right
    parts = [_open(width, height, "macro recall before and after alignment")]
    for tick in range(0, 101, 25):
        x = left + full * tick / 100
        parts.append(f'<line x1="{x}" x2="{x}" y1="4" y2="{height - 20}" stroke="{GRID}"/>')
        parts.append(_text(x, height - 4, f"{tick}"))
    for number, (label, before, after) in enumerate(rows):
        y = 10 + row * number
        parts.append(_text(left - 12, y + 24, label, anchor="end", color=INK))
        for value, color, down in ((before, BEFORE, 0), (after, AFTER, 19)):
            parts.append(
                f'<rect x="{left}" y="{y + down}" width="{full * value:.1f}" height="16" rx="2" fill="{color}"/>'
            )
            note = f"{100 * value:.1f}" + (f" ({100 * (after - before):+.1f})" if down else "")
            parts.append(_text(left + full * value + 6, y + down + 12, note, anchor="start", color=INK))
    parts.append("</svg>")
    return "".join(parts)


def patch_map(answers: Sequence[int], grid: tuple[int, int], truth: Sequence[Sequence[int]], cell: int = 24) -> str:
    """One answer a patch: a square in the body's colour with the core's inside; crossed out where it is wrong."""
    rows, columns = grid
    parts = [_open(columns * cell, rows * cell, "one class for every patch", css="map")]
    for number, answer in enumerate(answers):
        y, x = (number // columns) * cell, (number % columns) * cell
        parts.append(f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="#14181d" stroke="#2b333c"/>')
        if answer:
            body, core = (_css(part) for part in PAIRS[answer - 1])
            inner = cell * 0.3
            parts.append(f'<rect x="{x + 2}" y="{y + 2}" width="{cell - 4}" height="{cell - 4}" rx="3" fill="{body}"/>')
            parts.append(
                f'<rect x="{x + inner:.1f}" y="{y + inner:.1f}" width="{cell - 2 * inner:.1f}" '
                f'height="{cell - 2 * inner:.1f}" rx="2" fill="{core}"/>'
            )
        if answer not in truth[number]:
            near, far_x, far_y = 3, x + cell - 3, y + cell - 3
            cross = f"M{x + near} {y + near}L{far_x} {far_y}M{far_x} {y + near}L{x + near} {far_y}"
            parts.append(f'<path d="{cross}" stroke="#fff" stroke-width="2.5"/>')
    parts.append("</svg>")
    return "".join(parts)


def _css(color: int) -> str:
    return "rgb({:.0f},{:.0f},{:.0f})".format(*(255 * part for part in tuple(COLORS.values())[color]))


def _open(width: int, height: int, label: str, css: str = "chart") -> str:
    return (
        f'<svg class="{css}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", color: str = MUTED) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
