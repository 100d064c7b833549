"""One process at a time trains in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from locfast.errors import UserError

NAME = ".lock"


class Lock:
    """A record lock on RUN/.lock, which the system takes back when the process ends, however it ends.

    Not `flock`: forked decoding processes would share that one and outlive a killed run by some seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: IO[str] | None = None

    def take(self) -> None:
        """UserError when another process holds it. A file system that has no locks goes without."""
        self.release()
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise UserError(
                    f"--out {self.path.parent}: {holder} is training there at this moment, and two runs would spoil "
                    "each other's files. Wait for it, stop it, or give another --out."
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
