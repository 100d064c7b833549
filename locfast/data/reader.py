"""What a worker process does: read, decode and crop a few samples, and replace those that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locfast.data.augment import Augment
from locfast.data.crop import Plan, draw_numbers, geometry, plan
from locfast.data.decode import UnreadableImage
from locfast.data.decode.cpu import CpuDecoder, CpuPicture, decode_label_map
from locfast.data.decode.device import Encoded
from locfast.data.geometry import apply_to_label_map
from locfast.data.order import Order
from locfast.data.sources.fetch import Fetch
from locfast.data.sources.split import sample_name
from locfast.data.spec import ImageSpec, Record, Source
from locfast.data.watch import Notes, timed
from locfast.random import Keys

REFUSED = "JPEG that the decoder refused"


@dataclass(frozen=True)
class Job:
    """Samples to make, and whether they are the last ones of their batch."""

    position: list[int]
    epoch: list[int]
    index: list[int]
    last: bool


@dataclass
class HandedOn:
    """The samples of a job that go to the device as encoded bytes."""

    rows: list[int]
    """Their places in the job."""
    data: Tensor
    """Their bytes, one after the other: one tensor, so that it reaches the main process in shared memory."""
    lengths: list[int]
    sizes: list[tuple[int, int]]
    turns: list[tuple[bool, bool, bool]]
    plans: list[dict[str, Plan]]

    def images(self) -> list[Encoded]:
        chunks = self.data.split(self.lengths)
        return [Encoded(*each) for each in zip(chunks, self.sizes, self.turns, self.plans, strict=True)]


@dataclass
class Done:
    """A job's samples, on their way to the device; `views` and `label_map` hold [b, h, w, 3] and [b, h, w] uint8.

    Where a device decoder is at work, `views` hold the rows that were decoded here and `handed_on` the others.
    """

    position: list[int]
    epoch: list[int]
    index: list[int]
    last: bool
    views: dict[str, Tensor] = field(default_factory=dict)
    geometry: dict[str, dict[str, Any]] = field(default_factory=dict)
    label_map: dict[str, Tensor] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    unreadable: list[tuple[int, str, str]] = field(default_factory=list)
    """(place in the job, name, reason) of every file that failed, in the order in which they were tried."""
    handed_on: HandedOn | None = None
    kept: list[tuple[str, str]] = field(default_factory=list)
    """(kind, name) of every sample that was decoded here although a device decoder is at work."""
    hopeless: str = ""
    """Set when a sample and all of its replacements failed: what to tell the user."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What the job took, by "read" and "decode"."""

    def pin_memory(self) -> Done:
        """Called by torch's DataLoader."""
        self.views = {name: view.pin_memory() for name, view in self.views.items()}
        self.label_map = {name: maps.pin_memory() for name, maps in self.label_map.items()}
        return self


@dataclass
class _Sample:
    plans: dict[str, Plan]
    size: tuple[int, int]
    label_map: Tensor | None
    record: Record  # without its bytes
    pixels: dict[str, np.ndarray]  # empty: not decoded here
    data: bytes  # empty: decoded here
    turn: tuple[bool, bool, bool]
    kept: str  # why it was decoded here where a device decoder is at work


class Reader:
    """Makes `Done` of `Job`: torch's DataLoader calls it as a dataset whose items are jobs.

    `why_not` says of a picture why a device decoder does not take it ("" where it does); None: there is none.
    """

    def __init__(
        self, source: Source, spec: ImageSpec, order: Order, why_not: Callable[[CpuPicture], str] | None = None
    ) -> None:
        self.source, self.spec, self.order, self.why_not = source, spec, order, why_not
        self.decoder = CpuDecoder()
        self.augment = {name: Augment(view) for name, view in spec.views.items() if view.color}
        self.notes, self.fetch = Notes(), Fetch(source)
        self.refused: set[int] = set()

    def __getitem__(self, job: Job) -> Done:
        done = self._make(Done(job.position, job.epoch, list(job.index), job.last), job)
        done.seconds = self.notes.take()
        return done

    def _make(self, done: Done, job: Job) -> Done:
        self.fetch.ask(job.index)
        numbers = self._numbers(job.epoch, job.index)
        samples = []
        for i in range(len(job.index)):
            sample = self._first_readable(done, i, {name: rows[i] for name, rows in numbers.items()})
            if sample is None:
                return done
            samples.append(sample)
        if self.why_not:
            done.handed_on = _hand_on(samples)
            done.kept = [(sample.kept, sample.record.name) for sample in samples if sample.kept]
        for name in self.spec.views:
            if pixels := [sample.pixels[name] for sample in samples if sample.pixels]:
                done.views[name] = torch.from_numpy(np.stack(pixels))
            place = geometry([sample.plans[name] for sample in samples], [sample.size for sample in samples])
            done.geometry[name] = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in vars(place).items()}
            if self.spec.label_map:
                maps = [apply_to_label_map(place, i, s.label_map) for i, s in enumerate(samples)]  # type: ignore[arg-type]
                done.label_map[name] = torch.stack(maps)
        if self.spec.records:
            done.records = [sample.record for sample in samples]
        return done

    def again(self, done: Done, refused: set[int]) -> Done:
        """The same job, with the samples of the indices `refused` decoded here: no device decoder can."""
        reader = Reader(self.source, self.spec, self.order, self.why_not)
        reader.refused = refused
        again = reader[Job(done.position, done.epoch, done.index, done.last)]
        return replace(again, unreadable=[*done.unreadable, *again.unreadable], seconds=done.seconds)

    def _numbers(self, epochs: list[int], indices: list[int]) -> dict[str, np.ndarray]:
        keys = Keys(self.order.seed, torch.tensor(epochs), torch.tensor(indices))
        return {name: draw_numbers(view, name, keys) for name, view in self.spec.views.items()}

    def _first_readable(self, done: Done, i: int, numbers: dict[str, np.ndarray]) -> _Sample | None:
        """The sample asked for, or the first of its replacements that can be read, drawn with its own index."""
        epoch, asked = done.epoch[i], done.index[i]
        for attempt, index in enumerate(self._candidates(done.position[i], asked)):
            if attempt:
                numbers = {name: rows[0] for name, rows in self._numbers([epoch], [index]).items()}
            try:
                sample = self._read(epoch, index, numbers)
            except Exception as error:  # a source may raise anything: a missing file, bad JSON, a stale mount
                done.unreadable.append((i, sample_name(self.source, index), explain(error)))
            else:
                done.index[i] = index
                return sample
        _, name, reason = done.unreadable[-1]
        done.hopeless = (
            f"asked for the sample at position {done.position[i]}, found it unreadable, and so were its {attempt} "
            f"replacements; the last was {name} ({reason}). Is the disk still there? "
            "`python -m locfast.data stats SRC` checks a data source"
        )
        return None

    def _candidates(self, position: int, index: int) -> Iterator[int]:
        yield index
        yield from (probe for probe in self.order.replacements(position) if probe != index)

    def _read(self, epoch: int, index: int, numbers: dict[str, np.ndarray]) -> _Sample:
        with self.notes.reading(index):
            record = self.fetch.read(index)
        with timed(self.notes.seconds, "decode"):
            return self._decoded(record, epoch, index, numbers)

    def _decoded(self, record: Record, epoch: int, index: int, numbers: dict[str, np.ndarray]) -> _Sample:
        if self.spec.text and not any(text.strip() for text in record.texts):
            raise UnreadableImage("it has no text")
        picture = self.decoder.open(record.image)
        plans = {name: plan(view, picture.size, numbers[name].tolist()) for name, view in self.spec.views.items()}
        kept = REFUSED if index in self.refused else self.why_not(picture) if self.why_not else ""
        here = bool(kept) or not self.why_not
        pixels = self._pixels(picture, plans, epoch, index) if here else {}
        label_map = None
        if self.spec.label_map:
            if record.label_map is None:
                raise UnreadableImage("it has no label map")
            label_map = torch.from_numpy(decode_label_map(record.label_map))
        told = replace(record, image=b"", label_map=None)
        data = b"" if here else record.image
        return _Sample(plans, picture.size, label_map, told, pixels, data, picture.turn, kept)

    def _pixels(self, picture: CpuPicture, plans: dict[str, Plan], epoch: int, index: int) -> dict[str, np.ndarray]:
        pixels = dict(zip(plans, picture.render(list(plans.values())), strict=True))
        for name, augment in self.augment.items():
            pixels[name] = augment(pixels[name], Keys.of(self.order.seed, epoch, index), f"color.{name}")
        return pixels


def _hand_on(samples: list[_Sample]) -> HandedOn | None:
    rows = [i for i, sample in enumerate(samples) if sample.data]
    chosen = [samples[i] for i in rows]
    if not chosen:
        return None
    data = torch.frombuffer(bytearray().join(sample.data for sample in chosen), dtype=torch.uint8)
    lengths = [len(sample.data) for sample in chosen]
    sizes, turns = [sample.size for sample in chosen], [sample.turn for sample in chosen]
    return HandedOn(rows, data, lengths, sizes, turns, [sample.plans for sample in chosen])


def explain(error: Exception) -> str:
    """Why a sample could not be read, in a few words."""
    if isinstance(error, UnreadableImage):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
