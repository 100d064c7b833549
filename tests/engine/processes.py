"""Real training processes for tests: forked from a server that has imported torch, so that one starts in a moment."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import tests.engine.toy  # noqa: F401  (registers the method)
from locfast.config.files import from_dict, to_dict
from locfast.config.registry import run_config_class

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch._dynamo", "timm.optim", "locfast.engine.run", "tests.engine.toy"])


def start(config: object, output: Path, environment: dict[str, str] | None = None) -> BaseProcess:
    """Train as `config` says in a process of its own, as the command does; what it prints goes to the file `output`."""
    process = _server.Process(target=_train, args=(to_dict(config), str(output), environment or {}))
    process.start()
    return process


def start_ranks(config: object, output: Path, ranks: int) -> list[BaseProcess]:
    """The same run on `ranks` ranks, each one with the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(config, output.with_suffix(f".{rank}"), {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def finish(*processes: BaseProcess, seconds: float = 120) -> list[int | None]:
    """Wait for processes; their exit codes."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def kill_when(process: BaseProcess, condition: Callable[[], bool], seconds: float = 60) -> bool:
    """SIGKILL as soon as `condition` holds; whether the process was still alive then."""
    until = time.monotonic() + seconds
    while process.is_alive() and not condition():
        assert time.monotonic() < until, "the moment to kill at never came"
        time.sleep(0.0005)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def _train(values: dict, output: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    from locfast.cli import command
    from locfast.engine.run import train

    command(lambda: train(from_dict(run_config_class(values["method"]), values, "the test")))()
