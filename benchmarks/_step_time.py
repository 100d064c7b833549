"""The clock of benchmarks/step.py: whole steps, their parts one after the other, and the kernels that ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from _step_sides import Side
from torch import Tensor

from locfast.methods.maskembed import Draw, MaskEmbed
from locfast.random import Keys


def batch_of(method: MaskEmbed, size: int) -> tuple[Tensor, Draw]:
    """Noise for normalised images, and masks as training draws them."""
    device = method.device
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(size, 3, *method.teacher.image_size, generator=generator, device=device)
    index = torch.arange(size, device=device)
    return images, method.draw(Keys(0, torch.zeros_like(index), index))


def forward(side: Side, images: Tensor, draw: Draw) -> Tensor:
    with autocast(images.device):
        target = side.target(images, draw.visible)
        rebuilt = side.decode(side.encode(images), draw.visible)
        return side.loss(rebuilt, target, draw.visible)


@contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        yield


def time_steps(side: Side, method: MaskEmbed, size: int, repeats: int) -> tuple[list[float], float | None]:
    """Milliseconds of whole steps, and the peak of the memory in MiB, weights and states included."""
    device = method.device
    images, draw = batch_of(method, size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step() -> None:
        forward(side, images, draw).backward()
        side.update()

    times = [laps(device, [("step", step)])["step"] for _ in range(repeats + 2)][2:]
    return times, torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def time_parts(side: Side, method: MaskEmbed, size: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every part of a step, in the order in which they run."""
    device = method.device
    images, _ = batch_of(method, size)
    host = images.cpu().pin_memory() if device.type == "cuda" else images.clone()
    index = torch.arange(size, device=device)
    state: dict[str, Tensor] = {}

    def data() -> None:
        state.clear()  # what a step's parts hand on takes more memory than a step, and would outlive it
        state["images"] = host.to(device, non_blocking=True)

    def masks() -> None:
        state["visible"] = method.draw(Keys(0, torch.zeros_like(index), index)).visible

    def teacher() -> None:
        with autocast(device):
            state["target"] = side.target(state["images"], state["visible"])

    def encoder_forward() -> None:
        with autocast(device):
            state["embeddings"] = side.encode(state["images"])
            state["cut"] = state["embeddings"].detach().requires_grad_()

    def decoder_forward() -> None:
        with autocast(device):
            state["rebuilt"] = side.decode(state["cut"], state["visible"])
            state["joint"] = state["rebuilt"].detach().requires_grad_()

    def loss_both() -> None:
        with autocast(device):
            side.loss(state["joint"], state["target"], state["visible"]).backward()

    def decoder_backward() -> None:
        state["rebuilt"].backward(state["joint"].grad)

    def encoder_backward() -> None:
        state["embeddings"].backward(state["cut"].grad)

    order = [
        ("data", data),
        ("masks", masks),
        ("teacher", teacher),
        ("encoder forward", encoder_forward),
        ("decoder forward", decoder_forward),
        ("loss", loss_both),
        ("decoder backward", decoder_backward),
        ("encoder backward", encoder_backward),
        ("optimiser", side.update),
    ]
    runs = [laps(device, order) for _ in range(repeats + 1)][1:]
    return {name: [run[name] for run in runs] for name, _ in order}


def laps(device: torch.device, order: list[tuple[str, Callable[[], object]]]) -> dict[str, float]:
    """Run the functions one after the other; milliseconds of each by the device's clock."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
        torch.cuda.synchronize(device)
        marks[0].record()
        for (_, run), mark in zip(order, marks[1:], strict=True):
            run()
            mark.record()
        torch.cuda.synchronize(device)
        return {name: a.elapsed_time(b) for (name, _), a, b in zip(order, marks, marks[1:], strict=False)}
    found = {}
    for name, run in order:
        start = time.perf_counter()
        run()
        found[name] = 1e3 * (time.perf_counter() - start)
    return found


def kernels(side: Side, method: MaskEmbed, size: int, most: int = 40) -> str:
    """What ran on the device in one step, by time, as a table."""
    with torch.profiler.profile() as profile:
        time_parts(side, method, size, 1)
    averages = profile.key_averages()
    column = "self_device_time_total" if method.device.type == "cuda" else "self_cpu_time_total"
    return str(averages.table(sort_by=column, row_limit=most, max_name_column_width=90))
