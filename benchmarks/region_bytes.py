"""Does a rank of the region losses send and keep what `_region_cost.py` works out? Real ranks over gloo, counted.

Bytes of every call of torch.distributed must be those worked out, and so must what is kept for the backward. The
operating system's counters of the ranks' TCP sockets must have as many, and gloo's headers beside. Linux alone.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _harness import command, machine
from _region_cost import (
    Call,
    Setting,
    backward_calls,
    backward_travelling,
    forward_calls,
    forward_travelling,
    kept,
    wire,
)
from _region_rank import counted
from _results import RESULTS, commit, sources_hash

OP = "region_contrastive_loss"
EXCHANGES, DTYPES = ("ring", "gather"), ("float32", "bfloat16")
SIZES = [(2, 1024, 256), (4, 512, 256), (4, 1000, 96), (2, 2048, 512)]
"""Ranks, regions of a rank, width."""
PREAMBLE = 48
"""Bytes that each of gloo's messages begins with."""
MESSAGES = {"send": 3, "all_gather": 6, "all_reduce": 9, "reduce": 7}
"""At most so many for a call, of collectives to each other rank: gloo halves tensors, and announces both ways."""
ON_THE_WAY = 3
"""Announcements between two ranks that may have been sent before a count and come in after it."""


def main() -> None:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--out", type=Path, default=RESULTS / "cpu" / "region_plan", help="folder for bytes.json")
    args = known.parse_args()
    rows, wrong = [], []
    for ranks, regions, width in SIZES:
        asked = settings(ranks, regions, width)
        for at, found in zip(asked, counted(asked), strict=True):
            wrong += [f"{at}: {what}" for what in differences(at, found)]
            rows.append({"setting": asdict(at), **summary(at, found)})
            print(told(at, rows[-1]), flush=True)
    if wrong:
        sys.exit("\n".join(["not what was worked out:", *wrong]))
    head, dirty = commit()
    values = {
        "machine": machine(torch.device("cpu")),
        "sources": {name: sources_hash(name) for name in (f"{OP}/ops.py", f"{OP}/exchange.py")},
        "commit": head,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    aside = args.out / ".bytes.json"
    aside.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(aside, args.out / "bytes.json")
    print(f"written to {args.out / 'bytes.json'}")


def settings(ranks: int, regions: int, width: int) -> list[Setting]:
    """Both exchanges and dtypes, with and without a kept filter and gradients of texts; the sigmoid form."""
    size = dict(ranks=ranks, rows=regions, width=width, backend="tiled")
    found = []
    for exchange, dtype in itertools.product(EXCHANGES, DTYPES):
        common = dict(size, exchange=exchange, dtype=dtype)
        found += [Setting(**common, **other) for other in ({}, {"keeps_filter": False}, {"trains_texts": False})]
        found += [Setting(**common, form="sigmoid"), Setting(**common, filters=False)]
    return found


def differences(at: Setting, found: list[dict[str, Any]]) -> list[str]:
    """In what the ranks' counts are not those that were worked out; empty where all agree."""
    wrong = []
    for direction, wanted in (("forward", forward_calls(at)), ("backward", backward_calls(at))):
        expected = as_counted(wanted)
        for number, of_rank in enumerate(found):
            calls = {(kind, nbytes): times for kind, nbytes, times in of_rank[direction]["calls"]}
            if calls != expected:
                wrong.append(f"{direction}, rank {number}: calls {calls}, worked out {expected}")
        payload = at.ranks * wire(wanted, at.ranks)
        others = {call: 1 if call.kind == "send" else at.ranks - 1 for call in wanted}
        messages = sum(MESSAGES[call.kind] * call.times * others[call] for call in wanted)
        allowed = PREAMBLE * at.ranks * (messages + ON_THE_WAY * (at.ranks - 1))
        for way in ("sent", "received"):
            over = sum(of_rank[direction][way] for of_rank in found) - payload
            if not 0 <= over <= allowed:
                wrong.append(f"{direction}: {over} bytes {way} beyond the {payload} worked out, 0 to {allowed} allowed")
    if any(of_rank["kept"] != sum(kept(at).values()) for of_rank in found):
        wrong.append(f"kept {[of_rank['kept'] for of_rank in found]}, worked out {kept(at)}")
    for direction, most in (("forward", forward_travelling(at)), ("backward", backward_travelling(at))):
        held = [of_rank["held"][direction] for of_rank in found]
        if max(held) != most:
            wrong.append(f"{direction}: the exchange holds {held} bytes on ranks, worked out {most} at the most")
    return wrong


def as_counted(calls: Iterable[Call]) -> dict[tuple[str, int], int]:
    """(kind, bytes) -> how often, a send with what comes in meanwhile."""
    found: dict[tuple[str, int], int] = {}
    for call in calls:
        for kind in ("send", "receive") if call.kind == "send" else (call.kind,):
            if call.times:
                found[kind, call.nbytes] = found.get((kind, call.nbytes), 0) + call.times
    return found


def summary(at: Setting, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes that left all ranks together: worked out, and by the kernel's counters; kept on a rank."""
    row: dict[str, Any] = {}
    for direction, calls in (("forward", forward_calls(at)), ("backward", backward_calls(at))):
        row[direction] = {
            "worked out": at.ranks * wire(calls, at.ranks),
            "sent": sum(of_rank[direction]["sent"] for of_rank in found),
            "received": sum(of_rank[direction]["received"] for of_rank in found),
        }
    held = {what: max(of_rank["held"][what] for of_rank in found) for what in found[0]["held"]}
    return row | {"kept on a rank": found[0]["kept"], "held by an exchange": held}


def told(at: Setting, row: dict[str, Any]) -> str:
    """A line of the table."""
    filtered = "kept bits" if at.keeps_filter and at.filters else "fresh filter" if at.filters else "no filter"
    texts = "" if at.trains_texts else ", texts frozen"
    case = f"{at.ranks} ranks, R {at.rows}, E {at.width}, {at.dtype}, {at.form}, {filtered}{texts}, {at.exchange}"
    ways = (f"{way} {row[way]['worked out']:.0f} / {row[way]['sent']}" for way in ("forward", "backward"))
    return f"{case:<90} {', '.join(ways)}, kept {row['kept on a rank']}, held {row['held by an exchange']}"


if __name__ == "__main__":
    main()
