"""The design's targets for the region-contrastive loss, held against measured rows. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from _results import Row

OURS = "locfast triton"
REGIONS, MOST, WIDTH = 32768, 131072, 768
TFLOPS = 400.0
"""Of forward and backward together, counting 10 R^2 E."""
GROWTH = 1.1
"""Memory beyond one bit a pair is O(R E): bytes for each of the R E numbers may grow so much, from REGIONS to MOST."""


@dataclass(frozen=True)
class Target:
    """One line: what is wanted and what was measured."""

    what: str
    wanted: str
    measured: str
    verdict: str


def targets(rows: Sequence[Row]) -> list[Target]:
    """Those that a timed row of OURS decides; nothing is filled in."""
    at = {regions: _both(rows, regions) for regions in (REGIONS, MOST)}
    one, most = at[REGIONS], at[MOST]
    if one is None or one.rate is None:
        return []
    speed = "met" if one.rate >= TFLOPS else "not met"
    what = f"forward and backward at R {REGIONS}, E {WIDTH}"
    found = [Target(what, f"{TFLOPS:.0f} TFLOP/s", f"{one.rate:.0f} TFLOP/s", speed)]
    what = f"memory of both: R^2 / 8 bytes and O(R E), from R {REGIONS} to {MOST}"
    wanted, few = f"bytes per R E grow {GROWTH:.1f}x at most", _bytes_per_number(one)
    many = None if most is None else _bytes_per_number(most)
    if few is None or many is None:
        return [*found, Target(what, wanted, "", "not compared")]
    verdict = "met" if many <= GROWTH * few else "not met"
    return [*found, Target(what, wanted, f"{few:.1f} to {many:.1f}", verdict)]


def is_usual(row: Row) -> bool:
    """Whether a row is of the filtered loss at the width and scale that the targets are for."""
    return row.shape.get("E") == WIDTH and "scale 100, filter 0.9" in row.case


def _both(rows: Sequence[Row], regions: int) -> Row | None:
    here = [row for row in rows if is_usual(row) and row.shape["R"] == regions and row.direction == "both"]
    return next((row for row in here if row.who == OURS and row.ms is not None), None)


def _bytes_per_number(row: Row) -> float | None:
    """Of the peak beyond the inputs, less a bit for each pair."""
    if row.peak_mib is None:
        return None
    regions, width = row.shape["R"], row.shape["E"]
    return (row.peak_mib * 2**20 - regions**2 / 8) / (regions * width)


def table(found: Sequence[Target]) -> list[str]:
    """As Markdown, which a terminal shows well enough; empty where there is nothing to compare."""
    if not found:
        return []
    lines = [f"| of {OURS} | wanted | measured | |", "|---|---|---|---|"]
    return lines + [f"| {one.what} | {one.wanted} | {one.measured} | {one.verdict} |" for one in found]
