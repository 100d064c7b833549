"""A step's tables and picture: images a second beside target and limit, and where time goes. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from textwrap import shorten

from _plot import COLORS, INK, MUTED
from _results import Row

PARTS = (
    "teacher",
    "encoder forward",
    "decoder forward",
    "loss",
    "decoder backward",
    "encoder backward",
    "optimiser",
    "masks",
)
"""In the order of the picture. "data", a batch's copy to the GPU, runs beside a step and is no part of its time."""
LIMITS = {"clip_b16": 3080, "clip_l14_336": 311, "siglip_so400m_384": 179}
"""Images a second of an H200 that multiplies at 790 TFLOP/s throughout and does nothing else."""
TARGETS = {
    "bf16": {"clip_b16": 1850, "clip_l14_336": 187, "siglip_so400m_384": 107},
    "fp8": {"clip_b16": 2200, "clip_l14_336": 220, "siglip_so400m_384": 125},
}
"""On an H200: 60 % of the limit, and with the teacher's products in fp8."""
LEFT, BAR, TOP, LENGTH, RIGHT = 300, 26, 52, 560, 110


@dataclass
class Step:
    """What was measured of one way to take a model's step."""

    case: str
    who: str
    whole: Row | None = None
    parts: dict[str, Row] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return self.case.split(",")[0]

    @property
    def rate(self) -> float | None:
        """Images a second."""
        return 1e3 * self.whole.shape["B"] / self.whole.ms if self.whole is not None and self.whole.ms else None


def steps(rows: Sequence[Row]) -> list[Step]:
    """The rows put together, in their order."""
    found: dict[tuple[str, str], Step] = {}
    for row in rows:
        step = found.setdefault((row.case, row.who), Step(row.case, row.who))
        if row.direction == "step":
            step.whole = row
        else:
            step.parts[row.direction] = row
    return list(found.values())


def tables(rows: Sequence[Row], gpu: str, changed: bool) -> list[str]:
    """Markdown: whole steps, then their parts. Targets and limits are those of an H200."""
    judged = gpu == "NVIDIA H200"
    lines = ["| case | who | images/s | ms (p20, p80) | TFLOP/s | % of matmul | peak MiB | target | limit | |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    found = steps(rows)
    for step in found:
        row, note = step.whole, "*older kernel*" if changed and step.who.startswith("locfast") else ""
        if row is None or row.ms is None or step.rate is None:
            why = shorten(row.note, 90) if row else "only in parts"
            lines.append(f"| {step.case} | {step.who} | | | | | | | | {why} {note} |")
            continue
        target = TARGETS["fp8" if "fp8" in step.who else "bf16"].get(step.model) if judged else None
        wanted = f"{target} ({step.rate / target:.0%})" if target and step.who.startswith("locfast") else ""
        limit = (
            f"{LIMITS[step.model]} ({step.rate / LIMITS[step.model]:.0%})" if judged and step.model in LIMITS else ""
        )
        lines.append(
            f"| {step.case} | {step.who} | {step.rate:.0f} | {row.ms:.1f} ({row.ms_p20:.1f}, {row.ms_p80:.1f}) "
            f"| {row.rate:.0f} | {row.percent or 0:.0f} | {row.peak_mib or 0:.0f} | {wanted} | {limit} | {note} |"
        )
    lines += ["", "Milliseconds of its parts:", "", f"| case | who | {' | '.join(PARTS)} | data |"]
    lines.append("|---" * (len(PARTS) + 3) + "|")
    for step in found:
        if step.parts:
            cells = [f"{step.parts[part].ms:.2f}" if part in step.parts else "" for part in (*PARTS, "data")]
            lines.append(f"| {step.case} | {step.who} | {' | '.join(cells)} |")
    return lines


def picture(rows: Sequence[Row]) -> str | None:
    """Bars of a step's parts, a model's slowest as long as the picture is wide; None where nothing was measured."""
    drawn = [step for step in steps(rows) if step.rate is not None and all(part in step.parts for part in PARTS)]
    if not drawn:
        return None
    longest = {step.model: max(_per_image(other) for other in drawn if other.model == step.model) for step in drawn}
    height, width = TOP + BAR * len(drawn) + 16, LEFT + LENGTH + RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" role="img" aria-label="time of a step, by part">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for number, name in enumerate(PARTS):
        x, y = 12 + 210 * (number % 4), 14 + 18 * (number // 4)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="12" height="12" fill="{COLORS[number]}"/>')
        parts.append(_text(x + 18, y + 1, name, "start", INK))
    for number, step in enumerate(drawn):
        y, x = TOP + BAR * number, float(LEFT)
        parts.append(_text(LEFT - 8, y + 16, f"{step.model}, {step.who}", "end", INK))
        for color, name in zip(COLORS, PARTS, strict=False):
            length = LENGTH * (step.parts[name].ms or 0.0) / step.parts[name].shape["B"] / longest[step.model]
            parts.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="{BAR - 8}" fill="{color}"/>')
            x += length
        parts.append(_text(x + 8, y + 16, f"{step.rate:.0f} images/s", "start"))
    return "\n".join([*parts, "</svg>\n"])


def write_picture(rows: Sequence[Row], path: Path) -> bool:
    """`picture` as a file; False, and no file, where nothing was measured."""
    drawn = picture(rows)
    if drawn is not None:
        path.write_text(drawn)
    return drawn is not None


def _per_image(step: Step) -> float:
    return sum((step.parts[name].ms or 0.0) / step.parts[name].shape["B"] for name in PARTS)


def _text(x: float, y: float, text: str, anchor: str, color: str = MUTED) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
