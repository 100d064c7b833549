"""Reading ahead: the disk is told of a whole block of neighbours when the first of them is read."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Thread

import numpy as np

from locfast.data.sources.split import sample_name
from locfast.data.spec import Record, Source

REMEMBERED = 512
"""Blocks that a process does not ask for again: those of the buffer that is read (128), and of three more."""


def can_look_ahead(source: Source) -> bool:
    return getattr(source, "can_look_ahead", False)


class Ahead:
    """A source whose `will_need(first, end)` is called before a block is touched, once a block and process.

    `starts` [blocks] int64 are the first indices of the blocks, ascending; every sample lies in one.
    """

    def __init__(self, source: Source, starts: np.ndarray) -> None:
        self.source, self.starts = source, starts
        self._asked: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return sample_name(self.source, index)

    def read(self, index: int) -> Record:
        block = bisect.bisect_right(self.starts, index) - 1
        if block in self._asked:
            self._asked.move_to_end(block)
        else:
            self._asked[block] = None
            if len(self._asked) > REMEMBERED:
                self._asked.popitem(last=False)
            self.fetch(block)
        return self.source.read(index)

    def fetch(self, block: int) -> None:
        end = int(self.starts[block + 1]) if block + 1 < len(self.starts) else len(self)
        self.source.will_need(int(self.starts[block]), end)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return repr(self.source)


@contextmanager
def in_background(work: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """A function that has a thread call `work`, one value after the other: a full queue of a disk blocks who asks.

    What fails is passed over: the worker that reads the same samples will say so.
    """
    queue: SimpleQueue[int | None] = SimpleQueue()

    def run() -> None:
        while (value := queue.get()) is not None:
            with suppress(OSError):
                work(value)

    Thread(target=run, name="read ahead", daemon=True).start()
    try:
        yield queue.put
    finally:
        queue.put(None)
