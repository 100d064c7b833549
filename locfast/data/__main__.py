"""`python -m locfast.data SRC`: what a data source holds, how fast it decodes, and which files are damaged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from locfast.cli import command

if TYPE_CHECKING:
    from locfast.data.spec import Source

NAMED = 20
"""Damaged files that are printed."""


@dataclass(frozen=True)
class Look:
    """What was found out about one sample."""

    name: str
    bytes: int = 0
    size: tuple[int, int] = (0, 0)
    extras: tuple[str, ...] = ()
    problem: str = ""


def look(source: Source, index: int) -> Look:
    """Read and decode one sample in full, as a training view of 224 pixels would."""
    from locfast.data.crop import Plan
    from locfast.data.decode.cpu import CpuDecoder, decode_label_map
    from locfast.data.reader import explain
    from locfast.data.sources import sample_name

    try:
        record = source.read(index)
        picture = CpuDecoder().open(record.image)
        height, width = picture.size
        picture.render([Plan((224, 224), (0, 0, width, height), (0, 0, 224, 224), False, "bicubic")])
        if record.label_map is not None:
            decode_label_map(record.label_map)
    except Exception as error:
        return Look(sample_name(source, index), problem=explain(error))
    extras = tuple(name for name in ("text", "regions", "label_map") if getattr(record, name) is not None)
    return Look(record.name, len(record.image), picture.size, extras)


def looks(source: Source, count: int, workers: int) -> Iterator[Look]:
    """Look at `count` samples, evenly spread over the source."""
    indices = [i * len(source) // count for i in range(count)]
    if not workers:
        yield from (look(source, index) for index in indices)
        return
    with get_context("fork").Pool(workers, initializer=_remember, initargs=(source,)) as pool:
        yield from pool.imap(_look, indices, chunksize=8)


_source: Source


def _remember(source: Source) -> None:
    global _source
    _source = source


def _look(index: int) -> Look:
    return look(_source, index)


def report(source: Source, found: list[Look], seconds: float, workers: int) -> None:
    """Print what the samples looked at have in common."""
    good = [one for one in found if not one.problem]
    bad = [one for one in found if one.problem]
    print(f"{source!r}")
    for one in good[:3]:
        print(f"  {one.name}: {one.size[1]} x {one.size[0]}, {one.bytes / 1024:.1f} KiB")
    print(f"looked at {len(found)} of {len(source)}: {len(good)} can be read, {len(bad)} cannot")
    if good:
        sides = [sorted(one.size[k] for one in good) for k in (1, 0)]
        for what, pick in (("smallest", lambda s: s[0]), ("median", median), ("largest", lambda s: s[-1])):
            print(f"  {what} sides: {pick(sides[0]):.0f} wide, {pick(sides[1]):.0f} high")
        print(f"  median file: {median(one.bytes for one in good) / 1024:.1f} KiB")
        for extra in ("text", "regions", "label_map"):
            if number := sum(extra in one.extras for one in good):
                print(f"  with {extra}: {number}")
        print(f"  {len(found) / seconds:.0f} images/s with {workers or 1} process{'es' if workers > 1 else ''}")
    for one in bad[:NAMED]:
        print(f"  cannot read {one.name}: {one.problem}")
    if len(bad) > NAMED:
        print(f"  ... and {len(bad) - NAMED} more")


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m locfast.data", description=__doc__)
    parser.add_argument("source", help="image folder, file list (.txt), tar shards (folder or pattern), or demo")
    parser.add_argument("--count", type=int, default=1000, help="samples to look at, evenly spread; 0 for all")
    parser.add_argument("--workers", type=int, help="decoding processes; default: by the number of cores")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's scenes")
    args = parser.parse_args()

    from locfast.data.loader import default_workers
    from locfast.data.sources import open_source

    source = open_source(args.source, seed=args.seed)
    count = min(args.count, len(source)) if args.count > 0 else len(source)
    workers = default_workers() if args.workers is None else max(0, args.workers)
    start = perf_counter()
    found = list(looks(source, count, workers))
    report(source, found, perf_counter() - start, workers)
    if any(one.problem for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
