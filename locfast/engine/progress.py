"""What a run tells while it runs: speed, data wait, memory, MFU, time left; a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from locfast.engine.logs import log
from locfast.engine.schedule import Plan


class Meter:
    """Times a run between two lines of its log. `spent`: seconds that its batches took so far (`Loader.spent`)."""

    def __init__(
        self, plan: Plan, device: torch.device, ceiling: float | None, spent: Mapping[str, float] | None = None
    ) -> None:
        self.plan, self.device, self.ceiling, self.spent = plan, device, ceiling, spent or {}
        self.flops: int | None = None  # of one micro-batch, forward and backward
        self.waited = 0.0
        self.mark = time.perf_counter()
        self.step = 0
        self.spent_before = dict(self.spent)

    def start(self, step: int) -> None:
        self.mark, self.waited, self.step = time.perf_counter(), 0.0, step
        self.spent_before = dict(self.spent)

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
        images = steps * self.plan.batch / self.plan.ranks
        for what, now in self.spent.items():
            numbers[f"data_{what}_ms"] = 1000 * (now - self.spent_before[what]) / images
        if self.flops and self.ceiling:
            numbers["mfu"] = self.flops * self.plan.accumulation * steps / seconds / self.ceiling
        self.start(step)
        return numbers


class Display:
    """The line for the log, and a bar where somebody watches."""

    def __init__(self, plan: Plan, console: Console, enabled: bool) -> None:
        self.plan = plan
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


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
