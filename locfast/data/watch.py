"""Worker processes, watched: what each one reads and for how long, how it ends, and how its death is told."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar
from weakref import WeakSet

import numpy as np
import torch.utils.data

from locfast.data.orphan import end_with_the_parent
from locfast.data.sources.split import sample_name
from locfast.data.spec import Source
from locfast.errors import UserError

GRACE = 0.25
"""Seconds that a worker has to end by itself. It may be in the middle of a job of large images, or of a read from a
disk that does not answer, and has nothing to tidy up."""
_PROCESS, _INDEX, _BUSY = range(3)


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the time that the block takes to `seconds[what]`, also when it raises."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - begin


class Notes:
    """What a reader is at, and the seconds that went where since `take`. A worker's row lies in shared memory."""

    def __init__(self) -> None:
        self.row = np.zeros(3, np.int64)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def reading(self, index: int) -> Iterator[None]:
        self.row[_INDEX], self.row[_BUSY] = index, True
        with timed(self.seconds, "read"):
            yield

    def take(self) -> dict[str, float]:
        """The end of a job: its seconds, by "read" and "decode"."""
        self.row[_BUSY] = False
        seconds, self.seconds = self.seconds, {}
        return seconds


class Watch:
    """The workers of one iteration of a loader. Rows [workers, 3] int64 in shared memory: process, index, busy."""

    live: ClassVar[WeakSet[Watch]] = WeakSet()

    def __init__(self, workers: int, source: Source) -> None:
        self.source, self.parent = source, os.getpid()
        # anonymous memory is inherited by a fork and needs neither a file nor room in /dev/shm
        self.rows = np.frombuffer(mmap.mmap(-1, max(1, workers) * 3 * 8), np.int64).reshape(-1, 3)
        self.rows[:, _INDEX] = -1
        self.by_main_thread = threading.current_thread() is threading.main_thread()
        Watch.live.add(self)

    def begin(self, worker: int) -> None:
        """The first thing that a worker process does (`worker_init_fn`)."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
        if self.by_main_thread:
            end_with_the_parent(self.parent)
        row = self.rows[worker]
        row[_PROCESS] = os.getpid()
        torch.utils.data.get_worker_info().dataset.notes.row = row  # type: ignore[union-attr]  # a Reader

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Around the end of the workers: those that are busy for longer than GRACE are terminated.

        torch alone would wait five seconds for each of them, one after the other.
        """
        ours = set(self.rows[:, _PROCESS].tolist())
        children = [child for child in multiprocessing.active_children() if child.pid in ours]

        def terminate() -> None:
            for child in children:
                child.terminate()

        if sys.is_finalizing():  # a program that ends with its iterator open; Python would wait for ever for a thread
            terminate()
        timer = threading.Timer(GRACE, terminate)
        timer.daemon = True
        if children and not sys.is_finalizing():
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def file(self, process: int) -> str | None:
        """Where worker `process` was: `while reading PATH`; None when it is no worker of ours or has read nothing."""
        for number, index, busy in self.rows.tolist():
            if number == process and index >= 0:
                return f"{'while' if busy else 'after'} reading {sample_name(self.source, index)}"
        return None


def explain_dead_worker(error: Exception) -> UserError | None:
    """What to tell the user when `error` is the sign that a worker process died; None for any other error.

    torch raises a RuntimeError wherever the main thread happens to be, so a training loop may see it outside of the
    loader. Inside, fetching a tensor that a dead process had shared fails with an error of its connection.
    """
    lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    if not lost and "DataLoader worker (pid" not in str(error):
        return None
    if lost:
        try:
            time.sleep(0.2)  # a connection ends a moment before its process, at whose end torch raises
        except RuntimeError as death:
            error = death
    multiprocessing.active_children()  # reaps the dead one; torch would raise again at the end of every other worker
    told = f"{error} {error.__cause__ or ''}"  # torch's own search for dead workers hides what its signal handler said
    if lost and not _dead():  # an error of the caller's own, in what it yields positions from
        return None
    listed = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", told)
    processes = [int(process) for process in listed[1].split(",")] if listed else _dead()
    places = [place for process in processes for watch in list(Watch.live) if (place := watch.file(process))]
    who = f" (pid {', '.join(map(str, processes))})" if processes else ""
    where = f" {places[0]}" if places else ""
    return UserError(
        f"asked for the next batch, found that a decoding process{who} {_how(told)}{where}; most often the machine ran "
        "out of memory or of shared memory (df -h /dev/shm): try fewer --workers, or --workers 0. If it happens again "
        "at the same file, take that file out"
    )


def _how(told: str) -> str:
    """What torch says of a worker's end, in a few words."""
    if found := re.search(r"killed by signal: (\w[\w ]*)", told):
        return f"was killed ({found[1]})"
    if found := re.search(r"exit code (\d+)", told):
        return f"ended with exit code {found[1]}"
    return "had died"


def _dead() -> list[int]:
    """Workers that are gone, of all loaders that still iterate."""

    def gone(process: int) -> bool:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        return False

    known = [int(process) for watch in list(Watch.live) for process in watch.rows[:, _PROCESS] if process]
    return [process for process in known if gone(process)]
