"""Rows of kernels as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from locfast.machine_code.listing import Listing, Row

COLUMNS = (
    "kernel",
    "by",
    "arch",
    "regs",
    "spill B",
    "shared KiB",
    "threads",
    "blocks/SM",
    "warps/SM",
    "tensor cores",
    "limited by",
)
NAMES = 3
"""The first columns, which every row has; a row that failed has one sentence after them."""
LEFT = ("kernel", "by", "arch", "tensor cores", "limited by")


def table(rows: Sequence[Row]) -> str:
    """One line a kernel and architecture, columns aligned; a row that failed says why instead of figures."""
    cells = [_cells(row) for row in rows]
    widths = [
        max(map(len, column)) for column in zip(COLUMNS, *(c for c in cells if len(c) == len(COLUMNS)), strict=True)
    ]
    widths[:3] = [max(len(c[i]) for c in [COLUMNS, *cells]) for i in range(3)]
    lines = []
    for line in [COLUMNS, *cells]:
        aligned = [
            word.ljust(width) if name in LEFT else word.rjust(width)
            for name, word, width in zip(COLUMNS, line, widths, strict=False)
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def write_json(listing: Listing, path: Path) -> None:
    """Everything that is known of every row, instruction counts included."""
    content = {
        "triton": listing.triton,
        "notes": listing.notes,
        "kernels": [dataclasses.asdict(row) | {"tensor_core": row.tensor_core} for row in listing.rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cells(row: Row) -> tuple[str, ...]:
    name = (row.kernel, row.backend, f"sm_{row.arch}")
    if row.failed is not None:
        return (*name, row.failed if not row.known else f"failed: {row.failed}")
    at_most = "<=" if row.shared_bytes is None else ""
    return (
        *name,
        str(row.registers),
        str(row.spill_bytes),
        "dynamic" if row.shared_bytes is None else f"{row.shared_bytes / 1024:.1f}",
        "?" if row.threads is None else str(row.threads),
        f"{at_most}{row.occupancy.blocks}" if row.occupancy else "?",
        f"{at_most}{row.occupancy.warps}" if row.occupancy else "?",
        _tensor_core(row),
        row.occupancy.limited_by if row.occupancy else "?",
    )


def _tensor_core(row: Row) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in row.tensor_core.items()) or "-"
    return f"{counts} ({row.products_on_fma} products on FMA units)" if row.products_on_fma else counts
