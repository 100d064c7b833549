"""Real processes of `python -m locfast.vesl`: forked from a server that has imported torch and transformers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("torch", "nltk", "transformers.models.owlv2.modeling_owlv2", "transformers.models.owlv2.processing_owlv2"),
        *("transformers.models.auto.processing_auto", "transformers.models.auto.modeling_auto"),
        *("transformers.models.owlv2.image_processing_owlv2", "transformers.models.clip.tokenization_clip"),
        *("locfast.vesl.commands.steps", "locfast.vesl.detector", "locfast.data.loader", "locfast.engine.precision"),
    ]
)

CLOCKED = ("times", ".aside", ".vesl.lock")
"""What a folder holds beside its contents: times, which no two runs share, and locks."""


def start(
    arguments: list[object], output: Path, environment: dict[str, str], unlinks: int | None = None
) -> BaseProcess:
    """`unlinks`: SIGKILL to it when it has removed so many files and goes to remove another one."""
    process = _server.Process(target=_main, args=([str(one) for one in arguments], str(output), environment, unlinks))
    process.start()
    return process


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of all files that a run is for, by name."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(out)): path.read_bytes() for path in files if path.relative_to(out).parts[0] not in CLOCKED
    }


def _main(arguments: list[str], output: str, environment: dict[str, str], unlinks: int | None) -> None:
    os.environ.update(environment)
    if unlinks is not None:
        left, unlink = itertools.count(unlinks, -1), Path.unlink
        Path.unlink = lambda *args, **named: (  # type: ignore[method-assign]
            unlink(*args, **named) if next(left) else os.kill(os.getpid(), signal.SIGKILL)
        )
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["vesl", *arguments]
    import nltk

    nltk.data.path.insert(0, environment["NLTK_DATA"])  # which NLTK read when it was imported
    from locfast.vesl.__main__ import main

    main()
