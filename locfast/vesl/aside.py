"""Files that are whole or absent: written in a folder of this process, synced, and renamed to their place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

NAME = ".aside"
LOCK = "lock"


class Aside:
    """A folder OUT/.aside/HOST-PROCESS-... that is locked for as long as this process lives, however it ends.

    What a killed process left there is removed by the next one that can take its lock: on this machine or another one,
    but never while its owner may still be at work, and nowhere if the file system has no locks.
    """

    def __init__(self, out: Path) -> None:
        self.root = out / NAME
        self.folder, self._lock = self._own()
        self.removed = self._clean()

    def keep(self, path: Path, write: Callable[[Path], Any]) -> Any:
        """Have `write(a path in the folder aside)` make a file, and then rename it to `path`. What `write` returned."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.folder / path.name
        result = write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync(path.parent)
        return result

    def keep_lines(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        """JSON Lines."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # a file name that is no UTF-8 is kept as Python has it
        self.keep(path, lambda aside: aside.write_text(text, encoding="utf-8", errors="surrogateescape"))

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        with suppress(OSError):  # another process is at work
            self.root.rmdir()

    def _own(self) -> tuple[Path, IO[str]]:
        while True:
            name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
            folder = self.root / name
            try:
                folder.mkdir(parents=True)
                lock = open(folder / LOCK, "w", encoding="utf-8")  # noqa: SIM115
                take(lock)
            except FileNotFoundError:  # another process, which was ending, removed the root
                continue
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                lock.close()
                continue
            # a process that cleaned up between the two lines above took the folder for a dead one's
            if (folder / LOCK).exists():
                return folder, lock
            lock.close()

    def _clean(self) -> int:
        """Remove the folders of processes that are gone; their number."""
        removed = 0
        for other in self.root.iterdir():
            if other == self.folder:
                continue
            try:
                # made where it is not there yet: its owner may have died before, and one that lives takes another name
                with open(other / LOCK, "a", encoding="utf-8") as lock:
                    if take(lock):
                        shutil.rmtree(other, ignore_errors=True)
                        removed += 1
            except OSError:  # its owner lives, or has just removed it
                continue
        return removed


def take(file: IO[str]) -> bool:
    """Lock a file; False where the file system has no locks. OSError (EACCES, EAGAIN) when another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def read_lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return [json.loads(line) for line in file]


def _sync(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems know no sync of folders
        pass
    finally:
        os.close(handle)
