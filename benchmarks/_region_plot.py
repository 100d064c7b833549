"""Peak memory against regions. Standard library only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from _plot import Curves, draw
from _region_targets import is_usual
from _results import Row


def write(rows: Sequence[Row], path: Path) -> bool:
    """Forward alone and with its backward; False, and no file, where no memory was measured, as on a CPU."""
    panels = {title: curves(rows, way) for title, way in (("forward", "forward"), ("forward and backward", "both"))}
    return draw(panels, path, "peak memory against regions, E 768", across="regions", up="MiB beyond the inputs")


def curves(rows: Sequence[Row], direction: str) -> Curves:
    """Of the filtered loss at the usual width and scale; a variant of a kernel's cut needs what its kernel needs."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.ms is not None and row.peak_mib and row.direction == direction and is_usual(row) and ":" not in row.who:
            found[row.who][row.shape["R"]] = row.peak_mib
    return {who: sorted(points.items()) for who, points in found.items()}
