"""Where a run's messages go: the console and train.log, through the logger `locfast`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from locfast.errors import UserError

log = logging.getLogger("locfast")


class _File(logging.FileHandler):
    """A file that complains when it cannot be written: a full disk ends the run with a message of its own."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


class _Screen(logging.Handler):
    """Lines on the console, above a progress bar if there is one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def logging_to(path: Path, console: Console, first: bool) -> Iterator[None]:
    """Inside the block messages go to `path`, and on the first rank to the console; other ranks tell warnings only.

    What ends the block goes to the file too: the message of a user's mistake, the traceback of anything else.
    """
    file = _File(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    handlers: list[logging.Handler] = [file, _Screen(console)] if first else [file]
    for handler in handlers:
        handler.setLevel(logging.INFO if first else logging.WARNING)
        log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        _note(file, error)
        raise
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def _note(file: logging.Handler, error: BaseException) -> None:
    trace = None if isinstance(error, UserError | KeyboardInterrupt) else (type(error), error, error.__traceback__)
    text = str(error) or type(error).__name__
    with suppress(OSError):  # where the disk is full the console still tells it
        file.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, f"stopped: {text}", (), trace))
