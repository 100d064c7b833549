"""JPEG to batch: its table, beside what the steps of the recipes eat. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import _step_report
from _results import ROOT, Measurement, Row

TITLE = "JPEG to batch"
PEER = "DataLoader, PIL"
"""What every other way is compared with."""
WANTED = 1.5
"""Images that come, for each that a step eats."""


@dataclass
class Way:
    """What was measured of one way to make batches."""

    case: str
    who: str
    batch: Row | None = None
    """Milliseconds of a batch."""
    cpu: Row | None = None
    """Milliseconds of CPU for an image."""


@dataclass
class Need:
    """Images a second that a recipe's step eats on one GPU."""

    recipe: str
    size: int
    rate: float | None = None
    gpu: str = ""


@dataclass
class Table:
    """The ways of one case, in their order."""

    case: str
    ways: dict[str, Way] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return next((way.batch.shape["size"] for way in self.ways.values() if way.batch and way.batch.shape), 0)


def tables(rows: Sequence[Row]) -> list[Table]:
    found: dict[str, Table] = {}
    for row in rows:
        table = found.setdefault(row.case, Table(row.case))
        way = table.ways.setdefault(row.who, Way(row.case, row.who))
        if row.direction == "CPU":
            way.cpu = row
        else:
            way.batch = row
    return list(found.values())


def needs(results: Path, recipes: Path = ROOT / "locfast" / "recipes") -> list[Need]:
    """Of every recipe for photographs: locfast's fastest step of all that lie under `results`, whatever the GPU."""
    names = sorted(path.stem for path in recipes.glob("*.yaml") if path.stem != "demo")
    found = {name: Need(name, int(match[1]) if (match := re.search(r"_(\d{3})$", name)) else 224) for name in names}
    for path in sorted(results.glob("*/step*.json")):
        measurement = Measurement.read(path)
        for step in () if measurement.smoke else _step_report.steps(measurement.rows):
            need, rate = found.get(step.model), step.rate
            if need and rate and step.who.startswith("locfast") and rate > (need.rate or 0.0):
                need.rate, need.gpu = rate, measurement.machine["gpu"]
    return list(found.values())


def told(wanted: Sequence[Need]) -> str:
    """One sentence: what the recipes eat, and for which that is not known."""
    known = [f"{need.recipe} {need.rate:.0f} at {need.size} px ({need.gpu})" for need in wanted if need.rate]
    unknown = [need.recipe for need in wanted if not need.rate]
    parts = [f"Images a second that a recipe's fastest step eats: {', '.join(known)}."] if known else []
    parts += [f"No step was measured of {', '.join(unknown)}."] if unknown else []
    return " ".join(parts)


def against_peer(table: Table, way: Way) -> float | None:
    """Images a second over those of PEER in the same case."""
    peer = next((other for who, other in table.ways.items() if who.startswith(PEER)), None)
    rates = [one.batch.rate if one and one.batch else None for one in (way, peer)]
    return rates[0] / rates[1] if rates[0] and rates[1] else None


def against_needs(table: Table, way: Way, wanted: Sequence[Need]) -> dict[str, float]:
    """Recipe -> images that come for each that its step eats; of recipes with views of this size alone."""
    rate = way.batch.rate if way.batch else None
    return {need.recipe: rate / need.rate for need in wanted if rate and need.rate and need.size == table.size}


def printed(rows: Sequence[Row], wanted: Sequence[Need]) -> str:
    """The same for a terminal."""
    lines = [told(wanted)]
    for table in tables(rows):
        lines += ["", table.case]
        for way in table.ways.values():
            figures = " ".join(f"{figure:>20}" for figure in _figures(table, way))
            ratios = " ".join(f"{ratio:.2f}x of {name}" for name, ratio in against_needs(table, way, wanted).items())
            lines.append(f"{way.who:<32} {figures} {ratios}  {way.batch.note if way.batch else ''}".rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Row], wanted: Sequence[Need], changed: bool) -> list[str]:
    """Lines of the page."""
    lines = [
        told(wanted),
        "",
        f"A loader must give {WANTED}x what a step eats, and ranks of one machine share its cores. Files come from "
        "memory, not from a disk. The last column: by how much pixels differ from those of `cpu`.",
    ]
    for table in tables(rows):
        eaters = [need.recipe for need in wanted if need.rate and need.size == table.size]
        heads = [
            "",
            "images/s (p20, p80)",
            f"against {PEER}",
            "CPU ms/image (p20, p80)",
            *(f"of {name}" for name in eaters),
            "",
        ]
        lines += ["", f"{table.case}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for way in table.ways.values():
            note = way.batch.note.replace("|", "/") if way.batch else ""
            older = "*older kernel* " if changed and way.who.startswith("locfast") else ""
            cells = [way.who, *_figures(table, way)]
            ratios = against_needs(table, way, wanted)
            cells += [f"{ratios[name]:.2f}x" if name in ratios else "" for name in eaters]
            lines.append(f"| {' | '.join([*cells, f'{older}{note}'.strip()])} |")
    return lines


def _figures(table: Table, way: Way) -> list[str]:
    if way.batch is None or way.batch.ms is None:
        return ["", "", ""]
    images = way.batch.shape["B"] * 1e3
    low, high = images / (way.batch.ms_p80 or 1), images / (way.batch.ms_p20 or 1)
    ratio = against_peer(table, way)
    cpu = f"{way.cpu.ms:.2f} ({way.cpu.ms_p20:.2f}, {way.cpu.ms_p80:.2f})" if way.cpu else ""
    return [f"{way.batch.rate:.0f} ({low:.0f}, {high:.0f})", f"{ratio:.2f}x" if ratio else "", cpu]
