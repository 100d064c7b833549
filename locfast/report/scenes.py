"""Pictures of the demo's scenes: what every patch is taken for, drawn as the objects are."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from locfast.data.scenes import CLASSES, COLORS, PAIRS


def scene_map(answers: Sequence[int], grid: tuple[int, int], truth: Sequence[Sequence[int]], label: str) -> str:
    """One answer a patch: a square in the body's colour with the core's inside; crossed out where it is wrong."""
    (rows, columns), cell = grid, 24
    parts = [
        f'<svg viewBox="0 0 {columns * cell} {rows * cell}" role="group" aria-label="{escape(label)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    for number, answer in enumerate(answers):
        y, x = (number // columns) * cell, (number % columns) * cell
        drawn = f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="#14181d" stroke="#3a434d"/>'
        if answer:
            body, core = (_css(part) for part in PAIRS[answer - 1])
            inner = cell * 0.3
            drawn += f'<rect x="{x + 2}" y="{y + 2}" width="{cell - 4}" height="{cell - 4}" rx="3" fill="{body}"/>'
            drawn += (
                f'<rect x="{x + inner:.1f}" y="{y + inner:.1f}" width="{cell - 2 * inner:.1f}" '
                f'height="{cell - 2 * inner:.1f}" rx="2" fill="{core}"/>'
            )
        said = CLASSES[answer]
        if answer not in truth[number]:
            cross = f"M{x + 3} {y + 3}l{cell - 6} {cell - 6}m0 {6 - cell}l{6 - cell} {cell - 6}"
            drawn += f'<path d="{cross}" stroke="#101418" stroke-width="5"/>'
            drawn += f'<path d="{cross}" stroke="#fff" stroke-width="2.2"/>'
            said += f", wrong; there: {', '.join(CLASSES[k] for k in truth[number]) or 'nothing'}"
        words = escape(said)
        parts.append(f'<g class="mark" tabindex="-1" role="img" aria-label="{words}"><title>{words}</title>{drawn}</g>')
    return "".join([*parts, "</svg>"])


def _css(color: int) -> str:
    return "rgb({:.0f},{:.0f},{:.0f})".format(*(255 * part for part in tuple(COLORS.values())[color]))
