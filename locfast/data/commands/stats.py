"""What a data source holds: kinds and sizes of its images, and which of its files are damaged.

Every image is read and decoded in full. Exit code 0: all can be read; 1: some cannot; 2: there is no such source.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from locfast.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from locfast.data.commands.look import Look
    from locfast.data.spec import Source

NAMED = 20
"""Damaged files that are printed; --json names them all."""
EVERY = 10.0
"""Seconds between two lines that tell how far it is, where nobody watches a bar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="image folder, list (.txt), pairs (.jsonl), tar shards, or demo")
    parser.add_argument("--count", type=int, default=1000, help="samples to look at, evenly spread; 0 for all")
    parser.add_argument("--workers", type=int, help="decoding processes; default: by the number of cores")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's scenes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it all, with every broken file named")


def run(args: argparse.Namespace) -> int:
    from locfast.data.commands.look import looks, summary
    from locfast.data.loader import default_workers
    from locfast.data.sources import open_source

    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json}: not a file in a folder that exists. Make the folder, or name another.")
    source = open_source(args.source, seed=args.seed)
    count = min(args.count, len(source)) if args.count > 0 else len(source)
    workers = default_workers() if args.workers is None else max(0, args.workers)
    start, found = perf_counter(), []
    with progress(count) as advance:
        for one in looks(source, count, workers):
            found.append(one)
            advance(len(found), bool(one.problem))
    seconds = perf_counter() - start
    told = {
        "source": repr(source),
        "samples": len(source),
        **summary(found),
        "workers": workers,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(found) / seconds, 1),
    }
    report(source, found, told)
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(f"written to {args.json}")
    return 1 if told["broken"] else 0


@contextmanager
def progress(total: int) -> Iterator[Callable[[int, bool], None]]:
    """How far it is, to stderr: a bar on a terminal, elsewhere a line now and then. Yields what to call after each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, broken, last = Console(stderr=True), 0, perf_counter()
    told = (MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *told)
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task, start = bar.add_task("decoding", total=total, rate=""), last

    def advance(done: int, failed: bool) -> None:
        nonlocal broken, last
        broken, now = broken + failed, perf_counter()
        rate = f"{done / max(now - start, 1e-9):.0f} images/s, {broken} broken"
        bar.update(task, completed=done, rate=rate)
        if bar.disable and now - last > EVERY:
            last = now
            print(f"looked at {done} of {total}: {rate}", file=sys.stderr, flush=True)

    with bar:
        yield advance


def report(source: Source, found: list[Look], told: dict) -> None:
    """Print `told`, what `summary` says of all the samples looked at."""
    print(f"{source!r}")
    for one in [one for one in found if not one.problem][:3]:
        print(f"  {one.name}: {one.size[1]} x {one.size[0]}, {one.bytes / 1024:.1f} KiB")
    broken = told["broken"]
    print(f"looked at {len(found)} of {len(source)}: {told['readable']} can be read, {len(broken)} cannot")
    if told["readable"]:
        print(f"  formats: {_counts(told['formats'])}")
        print(f"  colours: {_counts(told['colours'])}")
        if told["rotated"]:
            print(f"  turned or mirrored by EXIF: {told['rotated']}")
        print(f"  {'':<12}{''.join(f'{name:>10}' for name in told['pixels']['width'])}")
        for name in ("width", "height"):
            print(f"  {name:<12}{''.join(f'{value:>10.0f}' for value in told['pixels'][name].values())}")
        print(f"  {'file, KiB':<12}{''.join(f'{value / 1024:>10.1f}' for value in told['file_bytes'].values())}")
        for name in ("text", "regions", "label_map"):
            if told[name]:
                print(f"  with {name}: {told[name]}")
        if region := told["region"]:
            print(f"  regions: {region['count']}, {_per_image(region)}; {_dropped(region['dropped'])}")
    processes = max(1, told["workers"])
    print(f"  {told['images_per_second']:.0f} images/s with {processes} process{'es' if processes > 1 else ''}")
    for reason, number in told["reasons"].items():
        print(f"  {number} x {reason}")
    for one in broken[:NAMED]:
        print(f"  cannot read {one['name']}: {one['reason']}")
    if len(broken) > NAMED:
        print(f"  ... and {len(broken) - NAMED} more; --json FILE names them all")


def _per_image(region: dict) -> str:
    spread = region["per_image"]
    return f"{spread['min']:.0f} to {spread['max']:.0f} an image, {spread['median']:.0f} in the median"


def _dropped(faults: dict[str, int]) -> str:
    total = sum(faults.values())
    return f"{total} of no use ({_counts(faults)})" if total else "all of use"


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in numbers.items())
