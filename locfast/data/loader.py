"""The loader: positions in, batches out; decoded in worker processes, normalised on the device."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from locfast.data.decode import get_decoder
from locfast.data.order import Order
from locfast.data.reader import Done, Job, Reader
from locfast.data.spec import Geometry, ImageSpec, Source, View
from locfast.errors import UserError
from locfast.interrupt import held

log = logging.getLogger("locfast")

Batch = dict[str, Any]

JOB_SIZE = 32
"""Samples that a worker makes at a time. Smaller than a batch, so that all workers share in the first one, and so that
what lies ready is bounded by workers and not by batch size."""


@dataclass
class Replaced:
    """What could not be read so far."""

    count: int = 0
    """Samples that stood in for an unreadable one."""
    names: dict[str, str] = field(default_factory=dict)
    """Every unreadable file, and why."""


class Loader:
    """Batches of a source for an ImageSpec; knows no model, no method, no rank.

    On a GPU a batch is moved and normalised on a stream of its own, at once when it is asked for: a caller that queues
    its work without waiting for it, as the training loop does, asks while the GPU still computes on the batch before.

    `workers` 0 decodes in this process, None chooses by the cores of this machine. `pin` None: pinned memory when the
    device is a GPU. `replaced` counts and names what could not be read, as far as batches were handed out.
    """

    replaced: Replaced

    def __init__(
        self,
        source: Source,
        spec: ImageSpec,
        *,
        seed: int,
        workers: int | None = None,
        device: torch.device | str = "cpu",
        decoder: str = "auto",
        pin: bool | None = None,
        prefetch: int = 4,
    ) -> None:
        self.source, self.spec, self.device = source, spec, torch.device(device)
        self.order = Order(len(source), seed)
        self.workers = default_workers() if workers is None else workers
        self.pin = self.device.type == "cuda" if pin is None else pin
        self.prefetch = prefetch
        self.replaced = Replaced()
        self._reader = Reader(source, spec, self.order, get_decoder(decoder))
        self._constants = {name: _constants(view, self.device) for name, view in spec.views.items()}
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # for the constants

    def batches(self, positions: Iterable[Tensor]) -> Iterator[Batch]:
        """One batch for each element of `positions`, a [B] int64 tensor of places in the stream of samples (`Order`).

        `positions` is read ahead of what is handed out. Closing the iterator ends the workers. Raises UserError when
        a sample and all of its replacements are unreadable, and when a worker process died.

        A batch: {"views": {name: [B, 3, h, w] fp32, normalised, on the device}, "geometry": {name: Geometry on the
        CPU}, "position", "epoch", "index": [B] int64 on the device; the index is that of the sample shown, also where
        it is a replacement}, with "label_map": {name: [B, h, w] uint8 on the device} and "records": [Record] * B
        where the spec asks for them.
        """
        return self._run((position, *self.order(position)) for position in positions)

    def sequential(self, epoch: int, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """Like `batches`, for samples in a given order: `indices` yields [B] int64 dataset indices, and every sample
        draws in `epoch` (a constant that training never reaches). Positions are the indices as asked for."""
        return self._run((index, torch.full_like(index, epoch), index) for index in indices)

    def state(self) -> dict[str, Any]:
        """What `replaced` holds, for a checkpoint (JSON)."""
        return {"count": self.replaced.count, "names": dict(self.replaced.names)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Count on from a checkpoint's `state()`; files named there are not named again."""
        self.replaced = Replaced(state["count"], dict(state["names"]))

    def _run(self, samples: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Batch]:
        options: dict[str, Any] = {}
        if self.workers:
            # Forked workers share the source's index instead of copying it.
            options = {"multiprocessing_context": "fork", "prefetch_factor": self.prefetch}
            options["worker_init_fn"] = _leave_ctrl_c_to_the_main_process
        parts: list[Done] = []
        dones: Iterator[Done] | None = None
        # Ctrl-C waits where locks of queues are taken, in this process and in those that it forks: a KeyboardInterrupt
        # between a lock's taking and the block that gives it back would let the end of the workers wait for ever.
        try:
            with held():
                dones = iter(
                    DataLoader(
                        self._reader,  # type: ignore[arg-type]  # a dataset whose items are jobs
                        batch_size=None,
                        sampler=self._jobs(samples),
                        num_workers=self.workers,
                        collate_fn=_as_it_is,
                        pin_memory=self.pin,
                        # Without one of its own, the DataLoader would draw from torch's global generator.
                        generator=torch.Generator(),
                        **options,
                    )
                )
            while True:
                with held():
                    done = self._next(dones)
                if done is None:
                    break
                parts.append(done)
                if done.last:
                    yield self._batch(parts)
                    parts = []
        finally:
            with held():
                del dones  # ends the workers, also when the caller stops early

    def _jobs(self, samples: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Job]:
        for position, epoch, index in samples:
            if not len(index) or index.min() < 0 or index.max() >= self.order.size:
                raise IndexError(f"a batch needs indices in 0 .. {self.order.size - 1}, got {index.tolist()}")
            for start in range(0, len(index), JOB_SIZE):
                part = slice(start, start + JOB_SIZE)
                last = start + JOB_SIZE >= len(index)
                yield Job(position[part].tolist(), epoch[part].tolist(), index[part].tolist(), last)

    def _next(self, dones: Iterator[Done]) -> Done | None:
        try:
            return next(dones, None)
        except (RuntimeError, OSError, EOFError) as error:
            raise explain_dead_worker(error) or error from None

    def _batch(self, parts: list[Done]) -> Batch:
        for part in parts:
            self._report(part)
        if self._stream is None:
            return self._on_device(parts)
        with torch.cuda.stream(self._stream):
            batch = self._on_device(parts)
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self._stream)
        for tensor in _tensors(batch):
            tensor.record_stream(here)  # or its memory could go to the next batch while this one is in use
        return batch

    def _on_device(self, parts: list[Done]) -> Batch:
        batch: Batch = {
            "views": {name: self._normalised(name, [part.views[name] for part in parts]) for name in self.spec.views},
            "geometry": {name: _geometry([part.geometry[name] for part in parts]) for name in self.spec.views},
        }
        for name in ("position", "epoch", "index"):
            values = torch.tensor([value for part in parts for value in getattr(part, name)], dtype=torch.int64)
            batch[name] = (values.pin_memory() if self.pin else values).to(self.device, non_blocking=True)
        if self.spec.label_map:
            maps = {name: [part.label_map[name] for part in parts] for name in self.spec.views}
            batch["label_map"] = {name: self._moved(map_parts) for name, map_parts in maps.items()}
        if self.spec.records:
            batch["records"] = [record for part in parts for record in part.records]
        return batch

    def _moved(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.to(self.device, non_blocking=True) for part in parts])

    def _normalised(self, name: str, parts: list[Tensor]) -> Tensor:
        white, mean, std = self._constants[name]
        pixels = self._moved(parts).permute(0, 3, 1, 2).contiguous().float()
        return pixels.div_(white).sub_(mean).div_(std)

    def _report(self, done: Done) -> None:
        """Count and name what a job could not read, once its batch is handed out: so workers change nothing."""
        counted = -1
        for place, name, reason in done.unreadable:
            self.replaced.count += place != counted
            counted = place
            if name not in self.replaced.names:
                self.replaced.names[name] = reason
                log.warning(
                    "cannot read %s (%s): another sample takes its place (so far %d files and %d samples)",
                    *(name, reason, len(self.replaced.names), self.replaced.count),
                )
        if done.hopeless:
            raise UserError(done.hopeless)


def default_workers() -> int:
    """Decoding processes of one rank: the cores this process may use, shared by the ranks of this machine, less one."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, len(os.sched_getaffinity(0)) // ranks - 1))


def explain_dead_worker(error: Exception) -> UserError | None:
    """What to tell the user when `error` is the sign that a worker process died; None for any other error.

    torch raises a RuntimeError wherever the main thread happens to be, so a training loop may see it outside of the
    loader. Inside, fetching a tensor that a dead process had shared fails with an error of its connection.
    """
    lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    if not lost and "DataLoader worker (pid" not in str(error):
        return None
    if lost:
        with suppress(RuntimeError):  # a connection ends a moment before its process, at whose end torch raises
            time.sleep(0.2)
    multiprocessing.active_children()  # reaps the dead one; torch would raise again at the end of every other worker
    return UserError(
        f"asked for the next batch, found that a decoding process had died ({error}); most often the "
        "machine ran out of memory or of shared memory (df -h /dev/shm): try fewer --workers, or --workers 0"
    )


def _leave_ctrl_c_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(done: Any) -> Any:
    return done


def _constants(view: View, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and standard deviation as tensors: by a Python number, CUDA multiplies with a rounded reciprocal."""
    mean, std = (
        torch.tensor(value, dtype=torch.float32, device=device).view(3, 1, 1) for value in (view.mean, view.std)
    )
    return torch.tensor(255.0, device=device), mean, std


def _tensors(batch: Batch) -> list[Tensor]:
    """Those of a batch that lie on the GPU."""
    inside = [value for part in batch.values() for value in (part.values() if isinstance(part, dict) else [part])]
    return [value for value in inside if isinstance(value, Tensor) and value.is_cuda]


def _geometry(parts: list[dict[str, Any]]) -> Geometry:
    rows = {name: [part[name] for part in parts] for name in ("box", "inside", "flip", "source_size")}
    joined = {name: torch.cat([torch.from_numpy(row) for row in parts]) for name, parts in rows.items()}
    return Geometry(**joined, size=parts[0]["size"])
