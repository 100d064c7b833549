"""Processes that fork off: they end with the one that made them, and touch nothing that it dropped."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

_PR_SET_PDEATHSIG = 1

# A pipeline of DALI that this process has dropped may wait for the garbage collector. Were a forked process to collect
# it, its end would wait for ever for threads that exist here alone. What is frozen at a fork, the child never collects.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


def end_with_the_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, is gone, busy or not. Linux only.

    The kernel means the *thread* that forked, so this is for forks of the main thread. Elsewhere torch's own watchdog
    remains for the workers of a loader: an idle one looks every five seconds whether its parent is there, a busy one
    after its job.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the kernel knew
        os._exit(1)


@contextmanager
def pool(workers: int, start: Callable[..., None] | None = None, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """`workers` forked processes, each begun with `start(*arguments)`. They share what this process holds.

    They leave Ctrl-C to this process, end with it, and are terminated when the block ends by an exception: what they
    are at then is wanted by nobody. Made by the main thread, or they outlive a parent that is killed.
    """
    before = set(multiprocessing.active_children())
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_begin, initargs=(parent, start, arguments)
    )
    try:
        yield executor
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(parent: int | None, start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent is not None:
        end_with_the_parent(parent)
    if start is not None:
        start(*arguments)
