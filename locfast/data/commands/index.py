"""`python -m locfast.data index SHARDS`: make the indexes of tar shards ahead of a run, and find broken shards."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

LINES = 10
"""Lines of progress where nobody watches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="a .tar shard, a folder of them, or a pattern; a path or a URL")
    parser.add_argument("--workers", type=int, help="processes that scan; default: the number of cores")


def run(args: argparse.Namespace) -> int:
    """Index every shard that has no index yet. Exit code 0, or 2 when a shard is missing or broken."""
    from locfast.data.sources import find_shards
    from locfast.data.sources.indexing import index_all
    from locfast.errors import UserError

    shards, store = find_shards(args.shards)
    workers = len(os.sched_getaffinity(0)) if args.workers is None else max(0, args.workers)
    start = perf_counter()
    samples = size = 0
    broken: dict[int, str] = {}
    with _progress(len(shards)) as advance:
        for number, index in index_all(shards, store, workers):
            if isinstance(index, UserError):
                broken[number] = str(index)
            else:
                samples += len(index.keys)
                size += int(index.place[..., 1].sum())
            advance()
    seconds = perf_counter() - start
    print(f"{len(shards)} shards, {samples} samples, {size / 1e9:.3g} GB of members, {seconds:.1f} s")
    for number in sorted(broken):
        print(f"broken: {broken[number]}")
    if broken:
        others = "; the others are indexed" if len(broken) < len(shards) else ""
        print(f"{len(broken)} of {len(shards)} shards cannot be used{others}")
    return 2 if broken else 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A function to call when a shard is done: a bar on a terminal, some lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if console.is_terminal:
        columns = (TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("indexing", total=total)
            yield lambda: bar.advance(task)
        return
    done = 0

    def line() -> None:
        nonlocal done
        done += 1
        if done * LINES // total > (done - 1) * LINES // total:
            print(f"{done} of {total} shards", file=sys.stderr, flush=True)

    yield line
