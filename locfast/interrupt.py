"""Ctrl-C ends a command within seconds, at whatever moment it comes.

Python raises KeyboardInterrupt between any two of its instructions. Three moments are unlucky: one in which a queue's
lock has just been taken, which nobody gives back then; one inside a finaliser or a fork's callback, whose exceptions
Python drops; and one in which a call into native code does not come back.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

PATIENCE = 5.0
"""Seconds that a command has to end by itself after Ctrl-C."""
_DROPPED, _CLOSED = 0, 255  # no signals have these numbers: Python dropped a KeyboardInterrupt; nothing to watch
_AGAIN = 0.05  # seconds until that is raised once more: out of the finaliser, in all likelihood


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C inside the block is raised at its end: for code that must not be left half done.

    A second one is raised at once where nothing watches that the first one ends the process. Processes that are forked
    inside hold it for good. Outside the main thread, where no signal arrives, nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        if len(came) > 1 and _Watch.running is None:
            before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])


@contextmanager
def watched(say: Callable[[], None], code: int) -> Iterator[None]:
    """Ctrl-C inside the block ends this process and its workers, by KeyboardInterrupt or else after PATIENCE.

    Then `say` is called and the exit code is `code`. Further ones change nothing: torchrun hands the terminal's on.
    Where Ctrl-C is ignored (a command in the background of a script) or has a handler already, it keeps that.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    watch = _Watch.running = _Watch(say, code)
    try:
        yield
    finally:
        if not watch.raised:  # or it goes on until the process is gone, whose end may hang too
            watch.close()


class _Watch:
    """A thread that the signal itself wakes, before and without Python's main thread."""

    running: _Watch | None = None

    def __init__(self, say: Callable[[], None], code: int) -> None:
        self.say, self.code, self.raised = say, code, False
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        signal.signal(signal.SIGINT, self.interrupt)
        self.fd_before = signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)
        self.hook_before = sys.unraisablehook
        sys.unraisablehook = self.unraisable
        self.thread = threading.Thread(target=self.run, name="ctrl-c", daemon=True)
        self.thread.start()

    def close(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(self.fd_before)
        sys.unraisablehook = self.hook_before
        os.write(self.write, bytes([_CLOSED]))
        self.thread.join()
        os.close(self.read)
        os.close(self.write)
        _Watch.running = None

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self.raised:
            self.raised = True
            raise KeyboardInterrupt

    def unraisable(self, dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            self.raised = False
            os.write(self.write, bytes([_DROPPED]))
        else:
            self.hook_before(dropped)

    def run(self) -> None:
        until = None
        while until is None or time.monotonic() < until:
            for number in self.next(until):
                if number == _CLOSED:
                    return
                if number == signal.SIGINT and until is None:
                    until = time.monotonic() + PATIENCE
                elif number == _DROPPED:
                    time.sleep(_AGAIN)
                    os.kill(os.getpid(), signal.SIGINT)
        self.say()
        for child in sys.modules["multiprocessing"].active_children() if "multiprocessing" in sys.modules else []:
            with suppress(OSError):
                child.kill()
        os._exit(self.code)

    def next(self, until: float | None) -> bytes:
        """Signals that arrived; nothing when it is `until`."""
        from select import select

        left = None if until is None else max(0.0, until - time.monotonic())
        return os.read(self.read, 64) if select([self.read], [], [], left)[0] else b""


def _leave_the_watch_to_the_parent() -> None:
    if _Watch.running is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_the_watch_to_the_parent)
