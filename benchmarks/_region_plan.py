"""CLOC's batch on many GPUs: what a rank of the region loss sends, stores and computes, and how long that may take.

Bytes are worked out (`_region_cost.py`, held to real ranks by `region_bytes.py`). Times are no measurement of such a
run: FLOPs at the rate that one GPU was measured at, and bytes over a link of an assumed speed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _harness import command
from _region_check import Shape
from _region_cost import Setting, backward_calls, forward_calls, kept, peak, plain_ways, wire
from _results import RESULTS, ROOT, Measurement, Row, commit, sources_hash

from locfast.kernels.region_contrastive_loss import OP

BATCH, PER_IMAGE, GPUS = 32768, 4, 64
"""Images of a step and regions of each, as in CLOC's settings; the GPUs are ours: the paper trained on TPUs."""
WIDTHS = {"ViT-B/16": 512, "ViT-L/14": 768, "ViT-H/14": 1024}
"""The joint embedding of CLIP's models of these sizes."""
LINK = 50.0
"""GB/s out of a GPU and into it: an assumption, 400 Gb/s InfiniBand to each."""
MEASURED = Path("nvidia-h200/region_loss.json")
RATE_AT, HOST_AT = 32768, 1024
"""Regions on the one GPU whose rate is taken; and at which all but the host's own time is next to nothing."""
PAGE = ROOT / "docs" / "kernels" / "region_contrastive_loss.md"
BEGIN, END = "<!-- plan: written by benchmarks/region_loss.py --plan -->\n", "<!-- /plan -->"
FILE = Path("cpu/region_plan/plan.json")


def plan(link: float = LINK, results: Path = RESULTS) -> dict[str, Any]:
    """All figures, from the sources and the measured rows alone. link: GB/s."""
    measured = Measurement.read(results / MEASURED)
    rows = []
    for model, width in WIDTHS.items():
        usual = measured_row(measured, RATE_AT, width)
        for exchange in ("ring", "gather"):
            at = Setting(GPUS, BATCH * PER_IMAGE // GPUS, width, exchange)
            ahead, back = forward_calls(at), backward_calls(at)
            sent = {"forward": wire(ahead, GPUS), "backward": wire(back, GPUS)}
            rows.append(
                {
                    "model": model,
                    "setting": asdict(at),
                    "sent": sent,
                    "calls": sum(call.times for call in (*ahead, *back)),
                    "sent with texts frozen": wire(ahead, GPUS) + wire(back[:1], GPUS),
                    "kept": kept(at),
                    "peak": peak(at),
                    "flops": at.flops,
                    "ms of products": at.flops / usual.rate / 1e9,
                    "ms on the link": sum(sent.values()) / link / 1e6,
                    "plain ways": [asdict(way) for way in plain_ways(at)],
                }
            )
    host, whole = (measured_row(measured, at, WIDTHS["ViT-L/14"]) for at in (HOST_AT, BATCH * PER_IMAGE))
    return {
        "assumed": {"images": BATCH, "regions of an image": PER_IMAGE, "GPUs": GPUS, "GB/s of a link": link},
        "measured": {
            "file": MEASURED.as_posix(),
            "commit": measured.commit,
            "TFLOP/s by width": {str(w): measured_row(measured, RATE_AT, w).rate for w in WIDTHS.values()},
            "ms of one small block": host.ms,
            "whole batch": {**whole.shape, "ms": whole.ms, "peak_mib": whole.peak_mib},
        },
        "rows": rows,
    }


def measured_row(measured: Measurement, regions: int, width: int) -> Row:
    """Triton's, both directions, as measured on one GPU alone. Raises ValueError where it was not."""
    name = Shape(regions, width).name
    for row in measured.rows:
        if (row.case, row.direction, row.who) == (name, "both", "locfast triton") and row.ms is not None:
            return row
    raise ValueError(f"{MEASURED} has no row for {name}")


def tables(found: dict[str, Any]) -> list[str]:
    """As Markdown."""
    assumed, rows = found["assumed"], found["rows"]
    gpus, own = assumed["GPUs"], rows[0]["setting"]["rows"]
    usual = next(row for row in rows if row["model"] == "ViT-L/14")
    return [
        _fill(
            f"{assumed['images']:,} images, {assumed['regions of an image']} regions of each, {gpus} GPUs: {own:,} "
            f"regions on a rank and {own * gpus:,} columns, in bf16, the filter's bits kept. A rank sends, and "
            "receives as much:"
        ),
        "",
        "| model, E | exchange | MiB, forward | MiB, backward | MiB of both, texts frozen | calls |",
        "|---|---|---|---|---|---|",
        *(_sent(row) for row in rows),
        "",
        "It stores, beyond inputs and their gradients, and computes, in both directions:",
        "",
        "| model, E | exchange | MiB of unit rows | of the filter | of sums | at the peak | TFLOP "
        f"| ms at the measured rate | ms on a link of {assumed['GB/s of a link']:g} GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_stored(row) for row in rows),
        "",
        f"Other ways at E {usual['setting']['width']}: "
        "the least a rank stores, and what it sends. SigLIP's loss is another:",
        "",
        "| way | MiB stored | MiB sent |",
        "|---|---|---|",
        *(f"| {way['name']} | {_mib(way['stored'])} | {_mib(way['sent'])} |" for way in usual["plain ways"]),
        "",
        *_remarks(found),
    ]


def _sent(row: dict[str, Any]) -> str:
    ways = [row["sent"]["forward"], row["sent"]["backward"], row["sent with texts frozen"]]
    return f"| {_case(row)} | {' | '.join(map(_mib, ways))} | {row['calls']} |"


def _stored(row: dict[str, Any]) -> str:
    parts = [*(row["kept"][name] for name in ("unit rows", "filter", "sums and norms")), row["peak"]]
    times = f"{row['ms of products']:.1f} | {row['ms on the link']:.1f}"
    return f"| {_case(row)} | {' | '.join(map(_mib, parts))} | {row['flops'] / 1e12:.2f} | {times} |"


def _remarks(found: dict[str, Any]) -> list[str]:
    """What the figures rest on and what they say."""
    measured, gpus = found["measured"], found["assumed"]["GPUs"]
    own, host, whole = found["rows"][0]["setting"]["rows"], measured["ms of one small block"], measured["whole batch"]
    slower = [row["ms on the link"] / row["ms of products"] for row in found["rows"]]
    rates = ", ".join(f"{rate:.0f} TFLOP/s at E {width}" for width, rate in measured["TFLOP/s by width"].items())
    return [
        _fill(
            f"- None of this ran on {gpus} GPUs. The rate is one H200's at R {RATE_AT:,} ({rates}; commit "
            f"{measured['commit'][:9]}), the link an assumption: on such a one bytes take {min(slower):.1f} to "
            f"{max(slower):.1f} times as long as products, so the wire, and not the kernels, would set the pace."
        ),
        _fill(
            f"- The host may cost more than both. Blocks are small here, {own:,} x {own:,} pairs, {gpus} in either "
            f"direction, and each is launched anew. R {HOST_AT:,} alone, one block and all that is around it, took "
            f"{host:.2f} ms, nearly all of it the host's; {gpus} times that are {gpus * host:.0f} ms, where the GPU "
            "has nothing else to do meanwhile."
        ),
        _fill(
            f"- On one GPU the whole batch fits, {whole['R']:,} regions at E {whole['E']}: {whole['ms']:.0f} ms and "
            f"{whole['peak_mib']:,.0f} MiB. Large blocks like those of R {RATE_AT:,} tell the kernels' rate and "
            "nothing of the blocks, launches and bytes of a rank: `python benchmarks/region_loss.py --share` measures "
            f"one rank's blocks and launches on one GPU, with all texts at hand; bytes want {gpus} GPUs."
        ),
    ]


def _fill(text: str) -> str:
    """Wrapped as the other pages are."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.0f}" if nbytes >= 10 * 2**20 else f"{nbytes / 2**20:.1f}"


def _case(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['setting']['width']} | {row['setting']['exchange']}"


def with_section(page: str, found: dict[str, Any]) -> str:
    """`page` with the tables between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has lost the marks between which the plan stands")
    return before + begin + "\n".join(["", *tables(found), "", ""]) + end + after


def main(args: argparse.Namespace) -> None:
    """Print; and write the JSON, and the page's section where nothing is asked for but the default."""
    found = plan(args.link_gb_s)
    print("\n".join(tables(found)))
    if args.link_gb_s != LINK and args.out is None:
        return
    head, dirty = commit()
    about = {
        "commit": head,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "sources": {name: sources_hash(name) for name in (f"{OP}/ops.py", f"{OP}/exchange.py")},
    }
    path = (args.out or RESULTS) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(about | found, indent=1) + "\n")
    os.replace(aside, path)
    print(f"written to {path}")
    if args.out is None:
        PAGE.write_text(with_section(PAGE.read_text(), found))
