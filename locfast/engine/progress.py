"""What a run tells while it runs: speed, data wait, memory, MFU, time left; a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from locfast.engine.logs import log
from locfast.engine.schedule import Plan

SLOW_DATA = 0.1
"""Share of the time spent waiting for data from which the log names the cause."""


class Meter:
    """Times a run between two lines of its log."""

    def __init__(self, plan: Plan, device: torch.device, ceiling: float | None) -> None:
        self.plan, self.device, self.ceiling = plan, device, ceiling
        self.flops: int | None = None  # of one micro-batch, forward and backward
        self.waited = 0.0
        self.mark = time.perf_counter()
        self.step = 0

    def start(self, step: int) -> None:
        self.mark, self.waited, self.step = time.perf_counter(), 0.0, step

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the place where the loop asks for the next batch."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around validation and checkpoints, which are no training time."""
        begin = time.perf_counter()
        yield
        self.mark += time.perf_counter() - begin

    def read(self, step: int) -> dict[str, float]:
        """Numbers since the last reading, and a new mark."""
        seconds, steps = time.perf_counter() - self.mark, step - self.step
        numbers = {
            "images_per_second": steps * self.plan.batch / seconds,
            "data_wait": self.waited / seconds,
            "peak_memory": float(peak_memory(self.device)),
        }
        if self.flops and self.ceiling:
            numbers["mfu"] = self.flops * self.plan.accumulation * steps / seconds / self.ceiling
        self.start(step)
        return numbers


class Display:
    """The line for the log, and a bar where somebody watches."""

    def __init__(self, plan: Plan, console: Console, device: torch.device, enabled: bool) -> None:
        self.plan, self.device, self.told = plan, device, False
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        shown = enabled and console.is_terminal
        self.bar = Progress(*columns, *times, console=console, disable=not shown, transient=True)
        self.task = self.bar.add_task("training", total=plan.steps)

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def line(self, step: int, numbers: dict[str, float]) -> None:
        left = (self.plan.steps - step) * self.plan.batch / numbers["images_per_second"]
        parts = [
            f"step {step}/{self.plan.steps}",
            f"epoch {numbers['epoch']:.2f}",
            f"loss {numbers['loss']:.5g}",
            f"lr {numbers['lr']:.2e}",
            f"gradient {numbers['grad_norm']:.3g}",
            f"{numbers['images_per_second']:.0f} images/s",
            f"data wait {numbers['data_wait']:.0%}",
            f"{numbers['peak_memory'] / 2**30:.1f} GiB",
            *([f"MFU {numbers['mfu']:.0%}"] if "mfu" in numbers else []),
            f"{timedelta(seconds=round(left))} left",
        ]
        log.info("  ".join(parts))
        # the first interval waits for the workers to start, and on a CPU decoding and training share the cores
        if numbers["data_wait"] > SLOW_DATA and step > 1 and self.device.type == "cuda" and not self.told:
            self.told = True
            log.info(
                "The GPU waits for data %.0f %% of the time: decoding is slower than training. More --workers help "
                "while there are idle cores; so do smaller images and tar shards on slow disks.",
                100 * numbers["data_wait"],
            )


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
