"""Ranks as processes that fork before there are threads: for scripts of their own, `python -m tests.…`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def run_ranks(ranks: int, work: Callable[[int], None]) -> int:
    """Run `work(rank)` in a process a rank; 0 where all ended well, else 1, with tracebacks on stderr."""
    children = []
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            try:
                work(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    return int(sum(os.waitpid(pid, 0)[1] for pid in children) > 0)
