"""Samples in their order, read and prepared by worker processes; one that cannot be read is told, not replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from locfast.data.reader import explain
from locfast.data.sources import sample_name
from locfast.data.sources.fetch import Fetch
from locfast.data.spec import Record, Source
from locfast.data.watch import Notes, Watch, explain_dead_worker
from locfast.interrupt import held

POLL = 0.25
"""Seconds of waiting for workers after which Ctrl-C gets its turn."""


@dataclass(frozen=True)
class Job:
    """Some samples of a chunk."""

    chunk: int
    indices: list[int]


@dataclass
class Fed:
    """A job's samples: `names` and `problems` ("" for a sample that could be read) of all, `batch` of the readable."""

    job: Job
    names: list[str]
    problems: list[str]
    lost: int
    """Samples whose file could not even be read, as when a disk is gone."""
    batch: Any = None
    """None where no sample could be read."""


class Jobs:
    """`read(record)` makes an item of a sample, or raises; `collate(items)` makes a batch. Both run in a worker."""

    def __init__(
        self, source: Source, read: Callable[[Record], Any], collate: Callable[[list[Any]], Any] = lambda items: items
    ) -> None:
        self.source, self.read, self.collate = source, read, collate
        self.notes, self.fetch = Notes(), Fetch(source)

    def __getitem__(self, job: Job) -> Fed:
        self.fetch.ask(job.indices)
        items, names, problems, lost = [], [], [], 0
        for index in job.indices:
            name = sample_name(self.source, index)
            try:
                with self.notes.reading(index):
                    record = self.fetch.read(index)
                name = record.name or name
            except Exception as error:  # a source may raise anything: a missing file, bad JSON, a stale mount
                problems.append(explain(error))
                lost += 1
            else:
                try:
                    items.append(self.read(record))
                    problems.append("")
                except Exception as error:
                    problems.append(explain(error))
            names.append(name)
        fed = Fed(job, names, problems, lost, self.collate(items) if items else None)
        self.notes.take()
        return fed


def feed(jobs: Jobs, wanted: Iterable[Job], workers: int) -> Iterator[Fed]:
    """What `wanted` asks for, in that order, made ahead of time by `workers` processes (0: here).

    Raises UserError when a worker dies.
    """
    watch = Watch(workers, jobs.source)
    options: dict[str, Any] = {}
    if workers:
        options = {"multiprocessing_context": "fork", "prefetch_factor": 2, "timeout": POLL}
        options["worker_init_fn"] = watch.begin
    fed: Iterator[Fed] | None = None
    try:
        # as in the training loader: Ctrl-C waits where locks of queues are taken
        with held():
            fed = iter(
                DataLoader(
                    jobs,  # type: ignore[arg-type]  # a dataset whose items are jobs
                    batch_size=None,
                    sampler=wanted,
                    num_workers=workers,
                    collate_fn=_as_it_is,
                    generator=torch.Generator(),
                    **options,
                )
            )
        while True:
            try:
                with held() if workers else nullcontext():
                    one = next(fed, None)
            except (RuntimeError, OSError, EOFError) as error:
                if "DataLoader timed out" in str(error):  # after POLL, and nothing is lost by it
                    continue
                raise explain_dead_worker(error) or error from None
            if one is None:
                return
            yield one
    finally:
        with held(), watch.ending():
            del fed


def _as_it_is(fed: Any) -> Any:
    return fed
