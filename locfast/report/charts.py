"""Charts as inline SVG whose every mark tells its numbers: on hover, on tap and to a screen reader.

All are drawn 360 units wide, so that their text can be read on a phone; colours are classes of style.css, which has
them for light and for dark. A series has a colour and a shape of its own, for eyes that do not tell the colours apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360, 38, 12, 24, 34
SERIES = 6
"""Looks in style.css; a seventh series looks like the second."""
MARKS = 60
"""Points of a curve that can be touched, about 5 units apart: a finger or pointer finds no more."""


@dataclass(frozen=True)
class Value:
    """A figure in shares of 1, or in what the chart says, with its 95 % interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    """Said on hover, behind the numbers."""


def look(series: int) -> str:
    """The class of a series: the first (a baseline) is grey; others share five looks."""
    return f"s{series}" if series < SERIES else f"s{1 + (series - 1) % (SERIES - 1)}"


def shape(x: float, y: float, series: int, size: float = 4.2) -> str:
    """The marker of a series around (x, y)."""
    kind = look(series)
    a, b, r = f"{x:.1f}", f"{y:.1f}", size
    if kind == "s0":
        return f'<circle class="dot hollow {kind}" cx="{a}" cy="{b}" r="{r - 0.4:.1f}"/>'
    if kind == "s1":
        return f'<circle class="dot {kind}" cx="{a}" cy="{b}" r="{r:.1f}"/>'
    corners = {
        "s2": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "s3": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        "s4": ((0, -1.3), (1.25, 1), (-1.25, 1)),
        "s5": ((0, 1.3), (1.25, -1), (-1.25, -1)),
    }[kind]
    points = " ".join(f"{x + r * 0.88 * i:.1f},{y + r * 0.88 * j:.1f}" for i, j in corners)
    return f'<polygon class="dot {kind}" points="{points}"/>'


def legend(names: Sequence[str], first: int = 0) -> str:
    """Marker and name of every series from number `first` on, as a list that wraps; nothing for one series alone."""
    keys = (
        f'<li><svg class="key" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{shape(7, 7, i)}</svg>'
        f"{escape(name)}</li>"
        for i, name in enumerate(names)
        if i >= first
    )
    return f'<ul class="legend">{"".join(keys)}</ul>' if len(names) - first > 1 else ""


def dots(
    rows: Sequence[tuple[str, Mapping[int, Value]]],
    names: Sequence[str],
    label: str,
    *,
    signed: bool = False,
    zero: bool = False,
) -> str:
    """Rows of (label, {series: value}) on one scale in percent: a marker, its interval, and the number beside it."""
    values = [one for _, row in rows for one in row.values()]
    if not values:
        return ""
    ends = [e for v in values for e in (v.value, v.low, v.high) if e is not None]
    ticks = nice_ticks(*(100 * e for e in (min([*ends, 0] if zero else ends), max([*ends, 0] if zero else ends))))
    line, head, gap, right = 15, 15, 7, 52
    top = 6
    height = top + sum(head + line * len(row) + gap for _, row in rows) + 24
    left, full = 10, WIDTH - 10 - right

    def across(value: float) -> float:
        return left + (100 * value - ticks[0]) / (ticks[-1] - ticks[0]) * full

    parts = [_open(height, label)]
    for tick in ticks:
        x = across(tick / 100)
        css = "axis" if tick == 0 and signed else "grid"
        parts.append(f'<line class="{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 22}"/>')
        parts.append(_text(x, height - 8, f"{tick:+g}" if signed and tick else f"{tick:g}"))
    y = float(top)
    for title, row in rows:
        parts.append(_text(left, y + 10, short(title, 48), "start", "name"))
        y += head
        for series, one in row.items():
            x, middle = across(one.value), y + line / 2
            bar = ""
            if one.low is not None and one.high is not None:
                bar = f'<line class="span {look(series)}" x1="{across(one.low):.1f}" x2="{across(one.high):.1f}" '
                bar += f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
            hit = f'<rect class="hit" x="0" y="{y:.1f}" width="{WIDTH}" height="{line}"/>'
            number = _text(WIDTH - 6, middle + 4, percent(one.value, signed), "end", "number")
            said = ", ".join(dict.fromkeys([title, *([names[series]] if series < len(names) else [])]))
            parts.append(_mark(hit + bar + shape(x, middle, series) + number, f"{said}: {told(one, signed)}"))
            y += line
        y += gap
    return "".join([*parts, "</svg>"])


def lines(
    curves: Mapping[str, Sequence[tuple[float, Value]]],
    x_label: str,
    y_label: str,
    *,
    scale: float = 1.0,
    x_ticks: Sequence[float] | None = None,
    markers: bool = False,
    may_be_log: bool = True,
) -> str:
    """Curves of (x, value): values times `scale` on the y axis, which is logarithmic beyond a decade if all are > 0.
    `may_be_log` False: it never is.

    With markers every point has one, with its interval. Values that are not finite leave a gap.
    """
    known = {name: [(x, v) for x, v in curve if math.isfinite(v.value)] for name, curve in curves.items()}
    points = [p for curve in known.values() for p in curve]
    if not points:
        return ""
    ends = [scale * e for _, v in points for e in (v.value, v.low, v.high) if e is not None and math.isfinite(e)]
    log = may_be_log and scale == 1 and min(ends) > 0 and max(ends) / min(ends) > 10
    height = 246
    if log:
        low, high = math.log10(min(ends)), math.log10(max(ends))
        y_ticks = [10 ** (low + (high - low) * i / 4) for i in range(5)]
    else:
        y_ticks = nice_ticks(min(ends), max(ends))
        low, high = y_ticks[0], y_ticks[-1]
    xs = [x for x, _ in points]
    across_ticks = list(x_ticks or nice_ticks(min(xs), max(xs), whole=True, within=True))
    first, last = min([*xs, *across_ticks]), max([*xs, *across_ticks])
    last = max(last, first + 1) if last == first else last

    def place(x: float, y: float) -> tuple[float, float]:
        up = ((math.log10(y) if log else y) - low) / (high - low)
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT), height - BOTTOM - up * (
            height - TOP - BOTTOM
        )

    parts = [_open(height, f"{y_label} against {x_label}"), _text(2, 10, y_label, "start")]
    for tick in y_ticks:
        _, y = place(first, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:.3g}", "end"))
    parts += [_text(place(tick, y_ticks[0])[0], height - BOTTOM + 15, f"{tick:g}") for tick in across_ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 4, x_label))
    for series, curve in enumerate(known.values()):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, scale * v.value)) for x, v in curve)
        parts.append(f'<polyline class="curve {look(series)}" points="{path}"/>')
    for series, (name, curve) in enumerate(known.items()):
        # Beside each other, not over each other: intervals of two series at one place would hide one another.
        aside = (series - (len(known) - 1) / 2) * 3 if markers else 0
        for x, v in curve[:: max(1, math.ceil(len(curve) / MARKS))]:
            a, b = place(x, scale * v.value)
            drawn = f'<circle class="hit" cx="{a:.1f}" cy="{b:.1f}" r="7"/>'
            if markers and v.low is not None and v.high is not None:
                bounds = (place(x, scale * e)[1] for e in (v.low, v.high))
                drawn += f'<line class="span {look(series)}" x1="{a + aside:.1f}" x2="{a + aside:.1f}" '
                drawn += 'y1="{:.1f}" y2="{:.1f}"/>'.format(*bounds)
            drawn += (
                shape(a + aside, b, series, 3.6)
                if markers
                else f'<circle class="spot" cx="{a:.1f}" cy="{b:.1f}" r="4"/>'
            )
            said = told(v) if scale == 100 else f"{v.value:.4g}"
            where = v.note or f"{x_label} {x:g}"
            parts.append(_mark(drawn, f"{name}, {where}: {said}", dense=not markers))
    return "".join([*parts, "</svg>"])


def strip(values: Sequence[tuple[str, Value]], label: str) -> str:
    """Signed values in points (shares of 1 times 100), side by side in the order given, with their intervals."""
    if not values:
        return ""
    height, full = 214, WIDTH - LEFT - RIGHT
    ends = [100 * e for _, v in values for e in (v.value, v.low, v.high) if e is not None]
    ticks = nice_ticks(min(0.0, *ends), max(0.0, *ends))
    step = full / len(values)

    def up(value: float) -> float:
        return height - 14 - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (height - TOP - 14)

    parts = [_open(height, label), _text(2, 10, "points", "start")]
    for tick in ticks:
        css = "grid" if tick else "axis"
        parts.append(f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(_text(LEFT - 6, up(tick) + 4, f"{tick:+g}" if tick else "0", "end"))
    for number, (name, one) in enumerate(values):
        x = LEFT + step * (number + 0.5)
        drawn = f'<rect class="hit" x="{x - step / 2:.2f}" y="{TOP}" width="{step:.2f}" height="{height - TOP - 14}"/>'
        if one.low is not None and one.high is not None:
            drawn += f'<line class="span thin s1" x1="{x:.1f}" x2="{x:.1f}" y1="{up(100 * one.low):.1f}" '
            drawn += f'y2="{up(100 * one.high):.1f}"/>'
        drawn += shape(x, up(100 * one.value), 1, min(4.0, max(1.3, step / 2.4)))
        parts.append(_mark(drawn, f"{name}: {told(one, True)}", dense=True))
    return "".join([*parts, "</svg>"])


def scatter(
    points: Sequence[tuple[str, float, float, bool, str]],
    trend: tuple[float, float] | None,
    x_label: str,
    y_label: str,
) -> str:
    """Numbered points (name, x, y, filled, note) in percent, and the line y = slope x + intercept."""
    height = 284
    xs, ys = [100 * p[1] for p in points], [100 * p[2] for p in points]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + right * (WIDTH - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)

    parts = [_open(height, f"{y_label} against {x_label}"), _text(2, 10, y_label, "start")]
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", "end"))
    parts += [_text(place(tick, y_ticks[0])[0], height - BOTTOM + 15, f"{tick:g}") for tick in x_ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 4, x_label))
    if trend is not None:
        slope, start = trend
        inside = [x_ticks[0], x_ticks[-1]]
        if slope:  # cut where the line leaves the box above or below
            cut = sorted((y - 100 * start) / slope for y in (y_ticks[0], y_ticks[-1]))
            inside = [max(inside[0], cut[0]), min(inside[1], cut[1])]
        if inside[0] < inside[1]:
            (a, b), (c, d) = (place(x, slope * x + 100 * start) for x in inside)
            drawn = f'<line class="trend" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'
            parts.append(_mark(drawn, f"trend: {y_label} = {slope:.3f} x {x_label} {100 * start:+.2f}"))
    for number, (name, x, y, filled, note) in enumerate(points, start=1):
        a, b = place(100 * x, 100 * y)
        drawn = f'<circle class="hit" cx="{a:.1f}" cy="{b:.1f}" r="11"/>' + shape(a, b, 1 if filled else 0, 4.6)
        drawn += _text(a + 8, b - 5, str(number), "start", "number")
        parts.append(_mark(drawn, f"{number}. {name}: {x_label} {100 * x:.2f}, {y_label} {100 * y:.2f}{note}"))
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, *, whole: bool = False, within: bool = False) -> list[float]:
    """Three to seven round numbers around low .. high (`within`: between them, the ends apart), in equal steps."""
    if high - low < 1e-9 * max(abs(high), abs(low), 1):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    step = max(1.0, math.ceil(step)) if whole else step
    if within:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)] or [low]


def percent(value: float, signed: bool = False) -> str:
    return f"{100 * value:+.2f}" if signed else f"{100 * value:.2f}"


def told(one: Value, signed: bool = False) -> str:
    """A value in percent, or in points, with its interval and its note: what a mark says."""
    said = percent(one.value, signed) + (" points" if signed else " %")
    if one.low is not None and one.high is not None:
        said += f" (95 % interval {percent(one.low, signed)} to {percent(one.high, signed)})"
    return said + (f"; {one.note}" if one.note else "")


def short(name: str, limit: int) -> str:
    """A name that is too long without its middle: where models differ is at either end."""
    if len(name) <= limit:
        return name
    keep = (limit - 1) // 2
    return f"{name[: limit - 1 - keep]}…{name[-keep:]}"


def _mark(drawn: str, said: str, dense: bool = False) -> str:
    """What can be touched and says `said`. Dense marks are left out of the order of the Tab key: a table has them."""
    words = escape(said)
    stop = "-1" if dense else "0"
    return f'<g class="mark" tabindex="{stop}" role="img" aria-label="{words}"><title>{words}</title>{drawn}</g>'


def _open(height: float, label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" role="group" '
        f'aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
