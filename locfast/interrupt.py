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
"""Seconds that a command has to end by itself after Ctrl-C; the demo's run takes 0.1 s, a tracker's last words more."""
_DROPPED = 0  # no signal has this number: Python dropped a KeyboardInterrupt
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


def watch(say: Callable[[], None], code: int) -> None:
    """From now on Ctrl-C ends this process and its workers: by KeyboardInterrupt, or after PATIENCE with exit `code`.

    `say` is called before the latter. Further ones change nothing: torchrun hands the terminal's on. Where Ctrl-C is
    ignored (a command in the background of a script) it stays so.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) in (
        None,
        signal.SIG_IGN,
    ):
        return
    if _Watch.running is None:
        _Watch.running = _Watch()
    _Watch.running.say, _Watch.running.code = say, code


class _Watch:
    """A thread that the signal itself wakes, before and without Python's main thread."""

    running: _Watch | None = None

    def __init__(self) -> None:
        self.say: Callable[[], None] = lambda: None
        self.code = 1
        self.raised = False
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        signal.signal(signal.SIGINT, self.interrupt)
        signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a worker's signals are its own
        self.told_before = sys.unraisablehook
        sys.unraisablehook = self.unraisable
        threading.Thread(target=self.run, name="ctrl-c", daemon=True).start()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self.raised:
            self.raised = True
            raise KeyboardInterrupt

    def unraisable(self, dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            self.raised = False
            os.write(self.write, bytes([_DROPPED]))
        else:
            self.told_before(dropped)

    def run(self) -> None:
        until = None
        while until is None or time.monotonic() < until:
            for number in self.next(until):
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
