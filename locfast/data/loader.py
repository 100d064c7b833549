"""The loader: positions in, batches out; read and decoded in worker processes, or decoded on the device."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from locfast.data.assemble import Assembler, Batch, on_gpu
from locfast.data.decode.choice import choose
from locfast.data.decode.device import BatchFailed, InUse, why_not
from locfast.data.order import Shuffle, arrange, foresee
from locfast.data.reader import Done, Job, Reader
from locfast.data.sources.needed import check_regions, check_texts
from locfast.data.spec import ImageSpec, Source
from locfast.data.watch import Watch, explain_dead_worker, timed
from locfast.errors import UserError
from locfast.interrupt import held

log = logging.getLogger("locfast")

JOB_SIZE = 32
"""Samples that a worker makes at a time. Smaller than a batch, so that all workers share in the first one, and so that
what lies ready is bounded by workers and not by batch size."""
POLL = 0.25
"""Seconds of waiting for workers after which Ctrl-C gets its turn."""


@dataclass
class Replaced:
    """What could not be read so far."""

    count: int = 0
    """Samples that stood in for an unreadable one."""
    names: dict[str, str] = field(default_factory=dict)
    """Every unreadable file, and why."""
    samples: int = 0
    """Samples handed out."""


class Loader:
    """Batches of a source for an ImageSpec; knows no model, no method, no rank.

    On a GPU a batch is moved and normalised on a stream of its own, at once when it is asked for: a caller that queues
    its work without waiting for it, as the training loop does, asks while the GPU still computes on the batch before.

    `decoder`: "cpu" decodes in the workers; "dali" and "nvjpeg" take the bytes and crops that these have read and drawn
    and decode on the device, one batch ahead; "auto" chooses among them. The attribute `decoder` is the one at work,
    `decoding` says why. What a device decoder does not take falls to the workers, counted by kind in `on_cpu`. Order,
    crops and which samples can be read are the same whichever decodes. Raises UserError for one asked for by name
    that cannot run.

    `instead` is what the log says comes of a sample that cannot be read, for a caller that drops replacements (in
    `sequential` the rows whose index is not their position).

    `workers` 0 reads in this process, None chooses by the cores of this machine. `pin` None: pinned memory when the
    device is a GPU. `replaced` counts and names what could not be read, as far as batches were handed out. `spent` are
    the seconds that these batches took: "read" and "decode", added up over workers, and "transfer", in which this
    process moved them to the device, assembled and (with a device decoder) decoded them.
    """

    replaced: Replaced
    on_cpu: Counter[str]

    def __init__(
        self,
        source: Source,
        spec: ImageSpec,
        *,
        seed: int,
        workers: int | None = None,
        device: torch.device | str = "cpu",
        decoder: str = "auto",
        shuffle: Shuffle = "auto",
        pin: bool | None = None,
        prefetch: int = 4,
        instead: str = "another sample takes its place",
    ) -> None:
        self.source, self.spec, self.device = source, spec, torch.device(device)
        if spec.text:
            check_texts(source)
        if spec.regions:
            check_regions(source)
        ordered, self.order = arrange(source, seed, shuffle)
        self.workers = default_workers() if workers is None else workers
        self.pin = self.device.type == "cuda" if pin is None else pin
        self.prefetch, self.instead = prefetch, instead
        self.replaced, self.on_cpu = Replaced(), Counter()
        self.spent = {"read": 0.0, "decode": 0.0, "transfer": 0.0}
        self._decoder, self.decoding = choose(decoder, spec, self.device)
        self.decoder = self._decoder.name if self._decoder else "cpu"
        self._reader = Reader(ordered, spec, self.order, why_not if self._decoder else None)
        self._assemble = Assembler(spec, self.device, self.pin)
        self._in_use, self._iterating = InUse(self.device), False
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
        if self.workers:  # then this process reads nothing itself
            positions = foresee(self._reader.source, self.order, positions)
        return self._run((position, *self.order(position)) for position in positions)

    def sequential(self, epoch: int, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """Like `batches`, for samples in a given order: `indices` yields [B] int64 dataset indices, and every sample
        draws in `epoch` (a constant that training never reaches). Positions are the indices as asked for."""
        return self._run((index, torch.full_like(index, epoch), index) for index in indices)

    def state(self) -> dict[str, Any]:
        """What `replaced` holds, for a checkpoint (JSON)."""
        return {**vars(self.replaced), "names": dict(self.replaced.names)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Count on from a checkpoint's `state()`; files named there are not named again."""
        self.replaced = Replaced(state["count"], dict(state["names"]), state["samples"])

    def _run(self, samples: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Generator[Batch]:
        with closing(self._parts(samples)) as parts:
            if self._decoder is None:
                yield from map(self._batch, parts)
            else:
                yield from self._one_ahead(parts)

    def _one_ahead(self, all_parts: Iterator[list[Done]]) -> Iterator[Batch]:
        """Batches of a device decoder, which works on the next one while the caller has this one."""
        assert self._decoder is not None
        if self._iterating:
            raise RuntimeError(
                f"a Loader that decodes with {self.decoder} iterates once at a time: close the other first"
            )
        begun: list[Done] | None = None
        self._iterating = True
        try:
            for parts in all_parts:
                # ended first: a batch waits for all that its stream was given, so not for the next one's decoding
                batch = self._end(begun) if begun else None
                self._begin(parts)
                begun = parts
                if batch is not None:
                    yield batch
            if begun:
                yield self._end(begun)
        finally:  # a caller that stops early leaves a batch under way, which the next iteration would find
            self._decoder.forget()
            self._iterating = False

    def _begin(self, parts: list[Done]) -> None:
        assert self._decoder is not None
        if images := [image for part in parts if part.handed_on for image in part.handed_on.images()]:
            with timed(self.spent, "transfer"), torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._decoder.begin(images)

    def _end(self, parts: list[Done]) -> Batch:
        assert self._decoder is not None
        try:
            with timed(self.spent, "transfer"), torch.cuda.stream(self._stream) if self._stream else nullcontext():
                decoded = self._decoder.end() if any(part.handed_on for part in parts) else None
        except BatchFailed as error:
            log.warning("%s refused a batch (%s): the CPU decodes what it does not take alone", self.decoder, error)
            parts, decoded = self._without_refused(parts)
        batch = self._batch(parts, decoded)
        self._in_use.hand_out(decoded)
        return batch

    def _without_refused(self, parts: list[Done]) -> tuple[list[Done], dict[str, Tensor] | None]:
        """A batch that was refused, again: with those images decoded on the CPU that the device does not take alone."""
        assert self._decoder is not None
        refused: set[int] = set()
        for part in parts:
            for row, image in zip(part.handed_on.rows, part.handed_on.images(), strict=True) if part.handed_on else ():
                try:
                    self._decoder.begin([image])
                    self._decoder.end()
                except BatchFailed:
                    refused.add(part.index[row])
        try:
            redone = [self._reader.again(part, refused) for part in parts]
            self._begin(redone)
            return redone, self._decoder.end() if any(part.handed_on for part in redone) else None
        except BatchFailed:  # each alone, but not together
            everything = {index for part in parts for index in part.index}
            return [self._reader.again(part, everything) for part in parts], None

    def _parts(self, samples: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Generator[list[Done]]:
        """What the workers made, put together by batches."""
        options: dict[str, Any] = {}
        watch = self._watch = Watch(self.workers, self.source)  # ours, so that a death can be explained afterwards
        if self.workers:
            # Forked workers share the source's index instead of copying it.
            options = {"multiprocessing_context": "fork", "prefetch_factor": self.prefetch, "timeout": POLL}
            options["worker_init_fn"] = watch.begin
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
                try:
                    with held() if self.workers else nullcontext():
                        done = next(dones, None)
                except (RuntimeError, OSError, EOFError) as error:
                    if "DataLoader timed out" in str(error):  # after POLL, and nothing is lost by it
                        continue
                    raise explain_dead_worker(error) or error from None
                if done is None:
                    break
                parts.append(done)
                if done.last:
                    yield parts
                    parts = []
        finally:
            with held(), watch.ending():
                del dones  # ends the workers, also when the caller stops early

    def _jobs(self, samples: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Job]:
        for position, epoch, index in samples:
            if not len(index) or index.min() < 0 or index.max() >= self.order.size:
                raise IndexError(f"a batch needs indices in 0 .. {self.order.size - 1}, got {index.tolist()}")
            for start in range(0, len(index), JOB_SIZE):
                part = slice(start, start + JOB_SIZE)
                last = start + JOB_SIZE >= len(index)
                yield Job(position[part].tolist(), epoch[part].tolist(), index[part].tolist(), last)

    def _batch(self, parts: list[Done], decoded: dict[str, Tensor] | None = None) -> Batch:
        for part in parts:
            self._report(part)
        with timed(self.spent, "transfer"):
            return self._transferred(parts, decoded)

    def _transferred(self, parts: list[Done], decoded: dict[str, Tensor] | None) -> Batch:
        if self._stream is None:
            return self._assemble(parts, decoded)
        with torch.cuda.stream(self._stream):
            batch = self._assemble(parts, decoded)
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self._stream)
        for tensor in on_gpu(batch):
            tensor.record_stream(here)  # or its memory could go to the next batch while this one is in use
        return batch

    def _report(self, done: Done) -> None:
        """Count and name what a job could not read, once its batch is handed out: so workers change nothing.
        Likewise the seconds that it took."""
        self.replaced.samples += len(done.position)
        for what, seconds in done.seconds.items():
            self.spent[what] += seconds
        counted = -1
        for place, name, reason in done.unreadable:
            self.replaced.count += place != counted
            counted = place
            if name not in self.replaced.names:
                self.replaced.names[name] = reason
                log.warning(
                    "cannot read %s (%s): %s (so far %d files and %d samples)",
                    *(name, reason, self.instead, len(self.replaced.names), self.replaced.count),
                )
        for kind, name in done.kept:
            if not self.on_cpu[kind]:
                log.info("the CPU decodes every %s (first: %s)", kind, name)
            self.on_cpu[kind] += 1
        if done.hopeless:
            raise UserError(done.hopeless)


def cores() -> int:
    """Cores of one rank: those that this process may use, shared by the ranks of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_workers() -> int:
    """Decoding processes of one rank: its cores less one, 16 at most."""
    return max(1, min(16, cores() - 1))


def _as_it_is(done: Any) -> Any:
    return done
