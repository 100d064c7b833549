"""Write docs/performance.md from benchmarks/results (`--check`: say whether it is up to date). Needs no torch."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import _attention_targets
import _input_report
import _region_targets
import _step_report
from _results import RESULTS, ROOT, Measurement, Row, sources_hash

PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

This page is generated from `benchmarks/results/` by `python benchmarks/report.py`; do not edit it. Every figure comes
from a JSON file there, with the commit, versions and a hash of the sources it was measured on. A figure that has no
file does not exist. Each implementation is checked against the reference before it is timed; `ms` is the median over
repeats with a cold L2 cache, followed by the 20th and 80th percentiles; `%` is of the ceiling that was measured in the
same run (a large copy, or a large bf16 matmul). Peak memory is what is allocated beyond the inputs; a backward's is
taken with its forward. Rows marked *older kernel* were measured on sources that have changed.

To measure on your GPU: `python benchmarks/suite.py --out benchmarks/results`.
"""
NOTHING = """
## Not measured yet

No GPU has run these benchmarks so far, so this page claims no speed. What is checked without one: every kernel's
results against the reference (Triton in its interpreter, CUDA ops by their CPU loop), and that the Triton kernels
compile for sm_90 without spills.
"""
CPU = """
## On a CPU

Memory is the peak resident size beyond weights and inputs, with the weights' gradients; each form in a process of its
own. Sizes do not depend on how fast or how busy a machine is. Times are there where the question is about CPUs: rows of
one table ran in turns on one machine, and compare with each other alone.
"""


def render(results: Path = RESULTS) -> str:
    """The page as Markdown. Smoke tests that somebody left there are passed over."""
    parts = [HEAD]
    machines = []
    for folder in sorted(folder for folder in results.glob("*") if folder.is_dir()):
        read = {path: Measurement.read(path) for path in sorted(folder.glob("*.json"))}
        machines.append({path: measurement for path, measurement in read.items() if not measurement.smoke})
    gpus = [found for found in machines if found and not _is_cpu(found)]
    if not gpus:
        parts.append(NOTHING)
    for found in (*gpus, *(found for found in machines if found and _is_cpu(found))):
        gpu = next(iter(found.values())).machine["gpu"]
        parts.append(CPU if gpu == "cpu" else f"\n## {gpu}\n")
        parts += [section(measurement, path.with_suffix(".svg")) for path, measurement in found.items()]
    return "".join(parts)


def _is_cpu(found: dict[Path, Measurement]) -> bool:
    return next(iter(found.values())).machine["gpu"] == "cpu"


def section(measurement: Measurement, chart: Path) -> str:
    """One benchmark's table, with its chart and its targets where it has them."""
    changed = [op for op, hashed in measurement.sources.items() if hashed != sources_hash(op)]
    versions = ", ".join(f"{name} {value}" for name, value in measurement.machine.items() if name != "gpu")
    told = [f"Measured {measurement.date[:10]} at {measurement.commit[:12]}", f"{versions}."]
    told[0] += " with changes; " if measurement.dirty else "; "
    if measurement.ceilings:
        told.append(
            " Ceilings: " + ", ".join(f"{value:.0f} {unit}" for unit, value in measurement.ceilings.items()) + "."
        )
    if measurement.command:
        told.append(f" To measure it again: `{measurement.command}`.")
    is_input = measurement.benchmark.startswith("input")
    title = _input_report.TITLE if is_input else measurement.benchmark
    lines = [f"\n### {title}\n", "".join(told) + "\n"]
    if chart.is_file():
        lines.append(f"![{measurement.benchmark}: {_what_is_drawn(measurement)}]({_from_page(chart)})\n")
    for room in (_attention_targets, _region_targets):
        wanted = room.table(room.targets(measurement.rows))
        if not wanted:
            continue
        lines += (["Of the older kernel:\n"] if changed else []) + [*wanted, ""]
    if is_input:
        needs = _input_report.needs(chart.parent.parent)
        lines += _input_report.markdown(measurement.rows, needs, bool(changed))
    elif measurement.benchmark.startswith("step"):
        lines += _step_report.tables(measurement.rows, measurement.machine["gpu"], bool(changed))
    elif all(row.ms is None and row.peak_mib is not None for row in measurement.rows):
        lines += ["| case | direction | who | peak MiB | |", "|---|---|---|---|---|"]
        lines += [memory_row(row, bool(changed)) for row in measurement.rows]
    else:
        lines += [
            "| case | direction | who | ms (p20, p80) | rate | % | peak MiB | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [table_row(row, bool(changed)) for row in measurement.rows]
    return "\n".join(lines) + "\n"


def _what_is_drawn(measurement: Measurement) -> str:
    if measurement.benchmark.startswith("step"):
        return "time by part"
    return "memory against regions" if measurement.benchmark.startswith("region_loss") else "time against tokens"


def _from_page(file: Path) -> str:
    return os.path.relpath(file, PAGE.parent)


def memory_row(row: Row, changed: bool) -> str:
    """Of a benchmark that measures memory alone."""
    return f"| {row.case} | {row.direction} | {row.who} | {row.peak_mib:.0f} | {_note(row, changed)} |"


def table_row(row: Row, changed: bool) -> str:
    note = _note(row, changed)
    if row.ms is None:
        return f"| {row.case} | {row.direction} | {row.who} | | | | | {note} |"
    percent = "" if row.percent is None else f"{row.percent:.0f}"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    rate = "" if row.rate is None else f"{row.rate:.1f} {row.unit}"
    return (
        f"| {row.case} | {row.direction} | {row.who} | {row.ms:.3f} ({row.ms_p20:.3f}, {row.ms_p80:.3f}) "
        f"| {rate} | {percent} | {peak} | {note} |"
    )


def _note(row: Row, changed: bool) -> str:
    note = row.note.replace("|", "/")
    return f"*older kernel* {note}".rstrip() if changed and row.who.startswith("locfast") else note


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
