"""Reading the samples of a job: one after the other from a disk, all at once where each is a request to a server."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from locfast.data.spec import Record, Source

AT_ONCE = 16
"""Requests of one process that are under way together. A server answers after some 20 to 100 ms, however small the
range, so a worker that asked for one image at a time would get 10 to 50 a second."""


def is_waited_for(source: Source) -> bool:
    """Whether reads of a source wait for a server rather than for this machine, behind whatever wraps the source."""
    inner: Any = source
    while not hasattr(inner, "is_waited_for") and hasattr(inner, "source"):
        inner = inner.source
    return bool(getattr(inner, "is_waited_for", False))


class Fetch:
    """Reads samples of `source`. What `ask` was told of is on its way when `read` wants it."""

    def __init__(self, source: Source) -> None:
        self.source, self.at_once = source, is_waited_for(source)
        self._pool: ThreadPoolExecutor | None = None  # made where it is used: threads do not survive a fork
        self._asked: dict[int, Future[Record]] = {}

    def ask(self, indices: list[int]) -> None:
        """Start to read these; forgets what was asked for before and not read."""
        if not self.at_once:
            return
        self._pool = self._pool or ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch")
        for left in self._asked.values():
            left.cancel()
        self._asked = {index: self._pool.submit(self.source.read, index) for index in indices}

    def read(self, index: int) -> Record:
        """Raises what the source's `read` raises."""
        asked = self._asked.pop(index, None)
        return asked.result() if asked else self.source.read(index)
