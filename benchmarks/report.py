"""Write docs/performance.md from benchmarks/results (`--check`: say whether it is up to date). Needs no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _results import RESULTS, ROOT, Measurement, Row, sources_hash

PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

This page is generated from `benchmarks/results/` by `python benchmarks/report.py`; do not edit it. Every figure comes
from a JSON file there, with the commit, versions and a hash of the sources it was measured on. A figure that has no
file does not exist. Each implementation is checked against the reference before it is timed; `ms` is the median over
repeats with a cold L2 cache, followed by the 20th and 80th percentiles; `%` is of the ceiling that was measured in the
same run (a large copy, or a large bf16 matmul). Rows marked *older kernel* were measured on sources that have changed.

To measure on your GPU: `python benchmarks/suite.py --out benchmarks/results`.
"""
NOTHING = """
## Not measured yet

No GPU has run these benchmarks so far, so this page holds no figure. What is checked without one: every kernel's
results against the reference (Triton in its interpreter, CUDA ops by their CPU loop), and that the Triton kernels
compile for sm_90 without spills.
"""


def render(results: Path = RESULTS) -> str:
    """The page as Markdown."""
    folders = sorted(folder for folder in results.glob("*") if folder.is_dir())
    measurements = [[Measurement.read(path) for path in sorted(folder.glob("*.json"))] for folder in folders]
    parts = [HEAD]
    for on_gpu in filter(None, measurements):
        parts.append(f"\n## {on_gpu[0].machine['gpu']}\n")
        parts += [section(measurement) for measurement in on_gpu]
    if not any(measurements):
        parts.append(NOTHING)
    return "".join(parts)


def section(measurement: Measurement) -> str:
    """One benchmark's table."""
    changed = [op for op, hashed in measurement.sources.items() if hashed != sources_hash(op)]
    versions = ", ".join(f"{name} {value}" for name, value in measurement.machine.items() if name != "gpu")
    ceilings = ", ".join(f"{value:.0f} {unit}" for unit, value in measurement.ceilings.items())
    lines = [
        f"\n### {measurement.benchmark}\n",
        f"Measured {measurement.date[:10]} at {measurement.commit[:12]}{' with changes' if measurement.dirty else ''}; "
        f"{versions}. Ceilings: {ceilings or 'none'}.\n",
        "| case | direction | who | ms (p20, p80) | rate | % | peak MiB | |",
        "|---|---|---|---|---|---|---|---|",
        *(table_row(row, bool(changed)) for row in measurement.rows),
    ]
    return "\n".join(lines) + "\n"


def table_row(row: Row, changed: bool) -> str:
    note = row.note
    if changed and row.who.startswith("locfast"):
        note = f"*older kernel* {note}".rstrip()
    if row.ms is None:
        return f"| {row.case} | {row.direction} | {row.who} | | | | | {note} |"
    percent = "" if row.percent is None else f"{row.percent:.0f}"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return (
        f"| {row.case} | {row.direction} | {row.who} | {row.ms:.3f} ({row.ms_p20:.3f}, {row.ms_p80:.3f}) "
        f"| {row.rate:.1f} {row.unit} | {percent} | {peak} | {note} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is out of date")
    check = parser.parse_args().check
    page = render()
    if not check:
        PAGE.write_text(page)
    elif not PAGE.is_file() or PAGE.read_text() != page:
        sys.exit("docs/performance.md does not show benchmarks/results as it is: run python benchmarks/report.py")


if __name__ == "__main__":
    main()
