"""How fast a stage is, and whether its device or its loader is waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Meter:
    """Wall time since the start, and what of it went to waiting for samples and to the device.

    A GPU counts as busy from the first kernel of a batch to its last one, by events on its stream; a CPU while it
    computes.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.images = 0
        self.busy_seconds = self.wait_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begin = time.perf_counter()

    @contextmanager
    def busy(self) -> Iterator[None]:
        if self.device is not None and self.device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            begin = time.perf_counter()
            yield
            self.busy_seconds += time.perf_counter() - begin

    def waited_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; what each took to come counts as waiting."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def read(self) -> dict[str, float]:
        """Images, and seconds in all, of the device and of waiting; waits for the device."""
        for begin, end in self._events:
            end.synchronize()
            self.busy_seconds += begin.elapsed_time(end) / 1e3
        self._events.clear()
        seconds = time.perf_counter() - self._begin
        return {"images": self.images, "seconds": seconds, "busy": self.busy_seconds, "waiting": self.wait_seconds}


def rates(now: dict[str, float], before: dict[str, float] | None = None) -> dict[str, float]:
    """Images, seconds, images a second, and shares of the wall time, between two readings of a meter."""
    taken = {name: value - (before[name] if before else 0) for name, value in now.items()}
    seconds = max(taken["seconds"], 1e-9)
    return {
        "images": taken["images"],
        "seconds": round(seconds, 3),
        "images_per_second": round(taken["images"] / seconds, 2),
        "device_busy": round(taken["busy"] / seconds, 4),
        "waiting_for_images": round(taken["waiting"] / seconds, 4),
    }


def told(reading: dict[str, float], device: str) -> str:
    """What `rates` gives, in words."""
    return (
        f"{reading['images_per_second']:.1f} images/s, {device} busy {100 * reading['device_busy']:.0f} % of the time, "
        f"waiting for images {100 * reading['waiting_for_images']:.0f} %"
    )
