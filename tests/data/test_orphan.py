"""Pools of processes: none outlives the process that made it, or the block that it was made for."""

import os
import signal
import subprocess
import sys
import time

import pytest

from locfast.data.orphan import pool

PROGRAM = """
import time
from locfast.data.orphan import pool

with pool(2) as helpers:
    work = [helpers.submit(time.sleep, 60) for _ in range(2)]
    print(*helpers._processes, flush=True)
    work[0].result()
"""


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(processes: list[int], seconds: float = 2.0) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.01)
    return not any(map(alive, processes))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_helpers_end_when_their_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as parent:
        helpers = [int(process) for process in parent.stdout.readline().split()]
        assert len(helpers) == 2 and all(map(alive, helpers))
        os.kill(parent.pid, signal.SIGKILL)
        assert wait_until_gone(helpers)


def test_a_block_that_ends_by_ctrl_c_does_not_wait_for_what_its_helpers_are_at():
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), pool(2) as helpers:
        helpers.submit(time.sleep, 60)
        processes = list(helpers._processes)
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 2
    assert wait_until_gone(processes)


def test_a_pool_that_ends_in_peace_gives_its_results():
    with pool(2, os.putenv, "LOCFAST_TEST", "1") as helpers:
        assert list(helpers.map(abs, range(-3, 0))) == [3, 2, 1]
