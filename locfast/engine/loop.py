"""The training loop: micro-batches in, optimiser steps out; the same for every method, and for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from locfast.config.base import OptimConfig, TrainConfig
from locfast.data.loader import Loader, cores
from locfast.data.spec import Source
from locfast.engine import checkpoint
from locfast.engine.distributed import World
from locfast.engine.ema import Average
from locfast.engine.flops import ceiling, count_flops
from locfast.engine.logs import log
from locfast.engine.nonfinite import MicroBatch, explain
from locfast.engine.optim import gate, set_learning_rate, state_tensors
from locfast.engine.precision import autocast
from locfast.engine.progress import Display, Meter
from locfast.engine.reading import Reading
from locfast.engine.run_folder import RunFolder
from locfast.engine.schedule import Plan, learning_rate
from locfast.engine.trackers import Jsonl, Tracker
from locfast.engine.unreadable import Unreadable
from locfast.engine.validate import Validation
from locfast.engine.waiting import Pipeline, Waiting
from locfast.methods.base import Batch, Method

_NAMES = ("forward_sync_buffers", "broadcast_buffers")  # of torch 2.15, and before
_LOCAL_BUFFERS: dict[str, Any] = {
    next(name for name in _NAMES if name in signature(DistributedDataParallel).parameters): False
}
"""Ranks make equal buffers by themselves, so none are sent at every step."""


@dataclass(frozen=True)
class Round:
    """A micro-batch of a step, the method's random numbers for it, and its first position in the stream."""

    batch: Batch
    draw: Any
    position: int
    last: bool


@dataclass(frozen=True)
class Taken:
    """A step that the host has queued."""

    step: int
    rate: float
    seen: list[MicroBatch]
    names: list[str]
    reading: Reading
    statistics: list[Tensor]
    """Running statistics of batch norm from before the step."""


@dataclass
class Trainer:
    """One run, ready to go: `config` is resolved, the method is on its device and holds the weights to start from."""

    config: TrainConfig
    optim: OptimConfig
    method: Method
    optimizer: torch.optim.Optimizer
    loader: Loader
    source: Source
    plan: Plan
    world: World
    precision: str
    folder: RunFolder
    display: Display
    jsonl: Jsonl | None
    trackers: list[Tracker]
    state: dict[str, Any]
    """What every checkpoint of the run says of it: identity, versions, fingerprint of the frozen weights."""
    average: Average | None = None
    validation: Validation | None = None
    model: nn.Module = field(init=False)

    taken: Taken | None = field(init=False, default=None)
    """The last step, as long as its numbers are on their way."""

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        norms = [module for module in self.method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self.device = self.method.device
        self.meter = Meter(self.plan, self.device, ceiling(self.device, self.precision), self.loader.spent)
        pipeline = Pipeline(self.device.type, self.loader.workers, cores(), self.loader.decoder)
        self.waiting = Waiting(pipeline, self.world.size)
        self.unreadable = Unreadable(self.loader, self.plan.samples, self.config.max_bad)
        warmup = round(self.optim.warmup_epochs * self.plan.samples / self.plan.batch)
        self.warmup = warmup if self.optim.warmup_steps is None else self.optim.warmup_steps
        if self.warmup >= self.plan.steps:
            flag = f"--{self.config.method}.optim.warmup-steps"
            log.warning("Warm-up takes %d steps of %d: --lr is never reached. %s", self.warmup, self.plan.steps, flag)
        self.save_every = self.config.save_every or math.ceil(self.plan.steps / 10)
        # what a method does after a step cannot be taken back: it waits to know that the step was sound
        self.frees_the_host = type(self.method).after_step is Method.after_step
        self.model = self.method
        if self.world.size > 1:
            self.model = DistributedDataParallel(self.method, gradient_as_bucket_view=True, **_LOCAL_BUFFERS)

    def fit(self, start: int) -> None:
        """Train from step `start` to the end of the plan."""
        if self.unreadable.exceeded(self.world):  # in the checkpoint already, or among what the method looked at
            raise self.unreadable.error(self.world, self.folder.path)
        batches = self.loader.batches(self.plan.micro_batches(start))
        self.meter.start(start)
        with self.display, closing(batches):  # type: ignore[type-var]  # a generator: closing it ends the workers
            self.display.advance(start)
            for step in range(start, self.plan.steps):
                self.train_step(step, batches)
                done = step + 1
                self.display.advance(done)
                last = done == self.plan.steps
                told = last or done == 1 or done % self.config.log_every == 0
                judged = self.validation is not None and self.plan.ends_epoch(done)
                saved = last or done % self.save_every == 0
                # ranks meet at these steps anyway; one rank alone need not wait for them
                meeting = told or judged or saved
                spoilt = (meeting or self.world.size == 1) and self.unreadable.exceeded(self.world)
                numbers = self.settle() if meeting or spoilt else {}
                if told:
                    self.record(done, {**numbers, **self.meter.read(done)}, line=True)
                with self.meter.paused():
                    if judged:
                        self.validate(done)
                    if saved or spoilt:
                        self.save(done)
                if spoilt:
                    raise self.unreadable.error(self.world, self.folder.path)

    def train_step(self, step: int, batches: Iterator[Batch]) -> None:
        """One optimiser step, number `step` from 0; `settle` gives its numbers.

        The host waits for no result of the step: a fused optimiser looks on the device whether loss and gradient are
        finite, and leaves weights and state alone where they are not. What the host waits for, before it queues the
        update, is the numbers of the step *before*, while the device has a forward and backward pass to do.
        """
        parts: dict[str, Tensor] = {}
        seen: list[MicroBatch] = []
        statistics = [buffer.clone() for buffer in self.statistics]
        for one in self.rounds(step, batches):
            losses = self.backward(one)
            seen.append(MicroBatch(one.position, one.batch["index"], one.batch["epoch"], losses["loss"]))
            for name, value in losses.items():
                parts[name] = parts.get(name, 0) + value
        names = sorted(parts)
        means = self.world.sum(torch.stack([parts[n] for n in names])) / (self.plan.accumulation * self.world.size)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        sound = means[names.index("loss")].isfinite() & norm.isfinite()
        self.settle()
        rate = learning_rate(step, self.plan.steps, self.config.lr or 0.0, self.warmup, self.optim.final_lr_ratio)
        reading = Reading(torch.cat([means, norm.double()[None]]))
        self.taken = Taken(step, rate, seen, [*names, "grad_norm"], reading, statistics)
        if not (gate(self.optimizer, sound) and self.frees_the_host):
            self.check(self.taken)
        set_learning_rate(self.optimizer, rate)
        if self.optim.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(step + 1, self.plan.steps)

    def settle(self) -> dict[str, float]:
        """Wait for the numbers of the last step: its loss and parts as means over the whole global batch, and more.

        A step counts only from here on: the averaged weights follow it, and one that is not finite ends the run.
        """
        taken, self.taken = self.taken, None
        if taken is None:
            return {}
        numbers = self.check(taken)
        if self.average is not None:
            self.average.update()
        return {"epoch": self.plan.epochs_done(taken.step + 1), "lr": taken.rate, **numbers}

    def check(self, taken: Taken) -> dict[str, float]:
        numbers = dict(zip(taken.names, taken.reading.values(), strict=True))
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            for buffer, before in zip(self.statistics, taken.statistics, strict=True):
                buffer.copy_(before)
            self.stop(taken.step, taken.seen, numbers)
        return numbers

    def rounds(self, step: int, batches: Iterator[Batch]) -> Iterable[Round]:
        """The micro-batches of a step; where the method looks ahead, with what it made of the step as a whole."""
        taken = (self.take(step, number, batches) for number in range(self.plan.accumulation))
        if not self.method.looks_ahead or self.plan.accumulation == 1:
            return taken
        rounds, looks = list(taken), []
        with torch.no_grad():
            for one in rounds:
                self.seed(one.position)
                with autocast(self.device, self.precision):
                    looks.append(self.method.look(one.batch, one.draw))
        with autocast(self.device, self.precision):
            weighed = self.method.weigh(looks)
        for one, ahead in zip(rounds, weighed, strict=True):
            one.batch["ahead"] = ahead
        return rounds

    def take(self, step: int, number: int, batches: Iterator[Batch]) -> Round:
        with self.meter.waiting():
            batch = next(batches)
        draw = self.method.draw(self.method.keys(self.config.seed, batch))
        last = number == self.plan.accumulation - 1
        return Round(batch, draw, self.plan.first_position(step, number), last)

    def seed(self, position: int) -> None:
        """What draws from torch's own generator (dropout) depends on the place in the stream alone, as all else."""
        torch.manual_seed((self.config.seed * 0x9E3779B97F4A7C15 + position) % 2**63)

    def backward(self, one: Round) -> dict[str, Tensor]:
        """Add one micro-batch's share of the gradients; its losses in fp64. The last one averages them over ranks."""
        if self.meter.flops is None and self.meter.ceiling:
            self.meter.flops = count_flops(self.method, one.batch, one.draw, self.precision)
        self.seed(one.position)
        with self.gradients_stay_here(not one.last):
            with autocast(self.device, self.precision):
                losses = self.model(one.batch, one.draw)
            (losses["loss"] / self.plan.accumulation).backward()
        return {name: value.detach().double() for name, value in losses.items()}

    def gradients_stay_here(self, stay: bool) -> AbstractContextManager[None]:
        return self.model.no_sync() if stay and isinstance(self.model, DistributedDataParallel) else nullcontext()

    def stop(self, step: int, seen: list[MicroBatch], numbers: dict[str, float]) -> None:
        """End the run at a loss or gradient that is not finite, with what is needed to do the step again."""
        found = explain(self, step, seen, numbers)
        target = checkpoint.step_folder(self.folder.path / "nonfinite", step)
        tensors, state = self.snapshot(step)
        self.world.on_first(lambda: checkpoint.write_folder(target, tensors, {**state, "nonfinite": found.record}))
        raise found.error(target)

    def record(self, step: int, numbers: dict[str, float], line: bool = False) -> None:
        """Give numbers to metrics.jsonl, to the trackers and, as a line, to the log."""
        if self.jsonl is None:
            return
        for tracker in (self.jsonl, *self.trackers):
            tracker.write(step, numbers)
        if line:
            self.display.line(step, numbers)
            self.waiting.hear(numbers)

    def validate(self, step: int) -> None:
        """Held-out losses of the weights, and of their average where one is kept."""
        if self.validation is None:
            return
        numbers = {f"val/{name}": value for name, value in self.validation.run(self.method).items()}
        if self.average is not None:
            with self.average.in_place():
                means = self.validation.run(self.method)
            numbers |= {f"val_ema/{name}": value for name, value in means.items()}
        self.record(step, {"epoch": self.plan.epochs_done(step), **numbers})
        ema = f", of the averaged weights {numbers['val_ema/loss']:.5g}" if self.average is not None else ""
        log.info("step %d  held-out loss %.5g%s", step, numbers["val/loss"], ema)

    def snapshot(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors and state of a checkpoint after `step` steps. All ranks call it."""
        optimizer, plain = state_tensors(self.optimizer, self.method)
        tensors = {"model": self.method.training_state(), "optimizer": optimizer}
        if self.average is not None:
            tensors["ema"] = self.average.tensors
        ranks = self.world.gather(self.loader.state())
        names = {name: why for state in ranks for name, why in state["names"].items()}
        data = {name: sum(state[name] for state in ranks) for name in ("count", "samples")} | {"names": names}
        position = step * self.plan.batch
        return tensors, {**self.state, "step": step, "position": position, "optimizer": plain, "data": data}

    def save(self, step: int) -> None:
        """Write a checkpoint and remove the oldest beyond those that are kept."""
        tensors, state = self.snapshot(step)

        def write() -> None:
            if self.jsonl is not None:
                self.jsonl.to_disk()
            path = checkpoint.save(self.folder.checkpoints, step, tensors, state)
            checkpoint.prune(self.folder.checkpoints)
            log.info("saved %s", path)

        self.world.on_first(write)
