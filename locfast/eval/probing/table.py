"""A comparison as a table on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

MEASURES = {"recall": "recall", "ap": "AP", "f1": "F1"}


def span(one: Mapping[str, Any] | None, signed: bool = False) -> str:
    """A figure in percent with its 95 % interval where it has one: "52.71 (51.90 to 53.40)"."""
    if one is None or one.get("value") is None:
        return "-"
    form = "{:+.2f}" if signed else "{:.2f}"
    value = form.format(100 * one["value"])
    if one.get("low") is None:
        return value
    return f"{value} ({form.format(100 * one['low'])} to {form.format(100 * one['high'])})"


def table(found: dict[str, Any]) -> Table:
    """Recall, AP and F1 of every head and backbone of `read_comparison`, and how far each lies from the baseline."""
    shown = Table(title=f"{found['data']}: macro averages in %, with 95 % intervals; differences from the baseline")
    for name in ("head", "backbone", *(part for m in MEASURES.values() for part in (m, "difference"))):
        shown.add_column(name, justify="left" if name in ("head", "backbone") else "right")
    for key, head in found["heads"].items():
        for number, (name, row) in enumerate(head["models"].items()):
            change = row.get("difference", {})
            cells = (part for m in MEASURES for part in (span(row[m]), span(change.get(m), True) if change else ""))
            last = number == len(head["models"]) - 1
            shown.add_row(key.replace("/", ", ") if number == 0 else "", name, *cells, end_section=last)
    return shown
