"""How fast batches come, and what they cost: images a second, and seconds of CPU of this process and its workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds in which Linux counts the time of a process: most often 0.01."""


@dataclass(frozen=True)
class Rate:
    """Of one run that was already under way when its clock started."""

    images: int
    seconds: float
    cpu_seconds: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of CPU for an image, over all cores."""
        return 1e3 * self.cpu_seconds / self.images


def measure(
    start: Callable[[], Iterator[object]], batch: int, workers: int, seconds: float, device: torch.device | str = "cpu"
) -> Rate:
    """Take batches of `batch` images from `start()` as fast as they come, for at least `seconds`.

    Batches of several workers come in bursts, so the clock runs over whole turns of all workers: from the end of one
    turn to the end of another. Before it starts every worker has begun its second batch, and since the taker never
    waits for anything else, nothing lies ready that was decoded before. The iterator is closed at the end.
    """
    turn, batches = max(1, workers), start()
    try:
        for _ in range(max(3, turn)):
            next(batches)
        _wait(device)
        count, cpu, begin = 0, cpu_seconds(), perf_counter()
        while count % turn or count == 0 or perf_counter() - begin < seconds:
            next(batches)
            count += 1
        _wait(device)
        taken = perf_counter() - begin
        return Rate(count * batch, taken, cpu_seconds() - cpu)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """Of this process and all below it since each began, those that ended included. Linux alone tells (/proc)."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # The name, in brackets, may hold anything; behind it come state, parent, ..., and from the 12th on utime,
            # stime, and both of the children that were waited for (man 5 proc).
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(fields[1]), []).append(int(folder.name))
        ticks[int(folder.name)] = sum(map(int, fields[11:15]))
    total, below = 0, [os.getpid()]
    while below:
        process = below.pop()
        total += ticks.get(process, 0)
        below += children.get(process, [])
    return total * TICK
