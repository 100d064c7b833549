"""Ctrl-C ends a run and its workers at whatever moment it comes, at those in which Python loses it or a lock too."""

from __future__ import annotations

import multiprocessing.queues
import multiprocessing.synchronize
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from locfast import interrupt
from locfast.cli import command
from locfast.interrupt import held
from tests.engine import processes
from tests.engine.toy import Toy, toy_config


def press() -> None:
    """What a terminal does: a signal to the whole group, decoding processes too."""
    os.killpg(os.getpgid(0), signal.SIGINT)


def press_when_taken(kind: type, where: Callable, main: bool) -> None:
    """Ctrl-C as soon as `where` has taken the lock of a condition, and before the block that gives it back."""
    enter, here, taken = kind.__enter__, os.getpid(), []

    def take(condition):
        got = enter(condition)
        if sys._getframe(1).f_code is where.__code__ and (os.getpid() == here) is main:
            taken.append(condition)
            if len(taken) == 20:
                press()
        return got

    kind.__enter__ = take


def in_a_queue_of_the_main_process() -> None:
    press_when_taken(threading.Condition, multiprocessing.queues.Queue.put, main=True)


def in_the_event_that_ends_the_workers() -> None:
    press_when_taken(multiprocessing.synchronize.Condition, multiprocessing.synchronize.Event.is_set, main=False)


def in_a_fork() -> None:
    pressed: list[bool] = []

    def once() -> None:
        if not pressed:
            pressed.append(True)
            press()

    os.register_at_fork(after_in_parent=once)


def again_and_again() -> None:
    os.register_at_fork(after_in_parent=press)
    Toy.after_step = lambda self, step, steps: press()


def in_a_finaliser() -> None:
    class Finalised:
        def __del__(self) -> None:
            press()
            time.sleep(0)  # where Python sees the signal

    Toy.after_step = lambda self, step, steps: Finalised() and None if step == 5 else None


def in_a_call_that_does_not_come_back() -> None:
    def after_step(self: Toy, step: int, steps: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # of this thread: as if it ran no Python
        press()
        time.sleep(1000)

    Toy.after_step = after_step


MOMENTS = [
    in_a_queue_of_the_main_process,
    in_the_event_that_ends_the_workers,
    in_a_fork,
    in_a_finaliser,
    again_and_again,
    in_a_call_that_does_not_come_back,
]


def _run(moment: Callable[[], None], values: dict, output: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    if moment is not in_a_call_that_does_not_come_back:
        interrupt.PATIENCE = 1000.0  # the run has to end by itself
    moment()
    processes._train(values, output, {})


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_ctrl_c_at_an_unlucky_moment_ends_the_run_and_its_workers_with_one_line(moment, images, tmp_path):
    workers = 0 if moment is in_a_call_that_does_not_come_back else 2  # the end of a worker would wake the call
    values = processes.to_dict(toy_config(images, tmp_path / "run", workers=workers, steps=100000))
    run = processes._server.Process(target=_run, args=(moment, values, str(tmp_path / "out")))
    run.start()
    try:
        run.join(30)
        assert run.exitcode == 130
        assert (tmp_path / "out").read_text().endswith("locfast: Stopped by Ctrl-C.\n")
        assert "Error" not in (tmp_path / "out").read_text()
        until = time.monotonic() + 10
        while group_exists(run.pid):
            assert time.monotonic() < until, "workers outlived the run"
            time.sleep(0.05)
    finally:
        if group_exists(run.pid):
            os.killpg(run.pid, signal.SIGKILL)


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def python_raises_at_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_held_is_done_before_ctrl_c_is_raised(python_raises_at_ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        signal.raise_signal(signal.SIGINT)
        done.append("all of the block")
    assert done == ["all of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_is_not_held(python_raises_at_ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the block")
    assert done == []


def test_a_command_that_ended_leaves_ctrl_c_as_it_was(python_raises_at_ctrl_c):
    before = sys.unraisablehook, threading.active_count()
    command(lambda: None)()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (sys.unraisablehook, threading.active_count()) == before


def test_other_threads_hold_nothing():
    done = []

    def work() -> None:
        with held():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
