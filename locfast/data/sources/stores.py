"""Where shards lie: what is asked of a place, and the files of this machine."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from locfast.data.sources.tar_index import VERSION, TarIndex, cached_index_path, index_path, kept, scan, write
from locfast.errors import UserError

OPEN_SHARDS = 128
"""File handles kept open in a process; the usual limit of a process is 1024."""


class Store(Protocol):
    """Random access to shards by name. Works in a forked process too, and survives pickling."""

    can_look_ahead: bool
    is_waited_for: bool
    """Whether a read waits for a server, so that many at once take no longer than one."""

    def look(self, shard: str) -> tuple[int, TarIndex | None]:
        """Size in bytes, and the index that was kept for the shard as it is now. UserError for a missing shard."""
        ...

    def index(self, shard: str) -> TarIndex:
        """Scan the shard and keep its index. UserError for a shard that is unreadable, compressed or broken."""
        ...

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """OSError where fewer bytes are there."""
        ...

    def will_need(self, shard: str, offset: int, size: int) -> None:
        """Start to read in the background, where `can_look_ahead`."""
        ...


class Disk:
    """Files. Reads name their own place (pread), so sharing a handle after a fork does no harm."""

    can_look_ahead = hasattr(os, "posix_fadvise")
    is_waited_for = False

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def look(self, shard: str) -> tuple[int, TarIndex | None]:
        stamp, paths = self._stamp(shard), self._index_paths(shard)
        return int(stamp[1]), next((index for path in paths if (index := kept(path, stamp)) is not None), None)

    def index(self, shard: str) -> TarIndex:
        stamp = self._stamp(shard)  # taken first: a shard that changes while it is scanned is scanned again
        try:
            with open(shard, "rb") as file:
                index = scan(shard, file, int(stamp[1]))
        except OSError as error:
            raise UserError(f"asked for the shard {shard}, which cannot be read ({error}); check the disk") from None
        any(write(path, index, stamp) for path in self._index_paths(shard))  # in the first place that takes it
        return index

    def read(self, shard: str, offset: int, size: int) -> bytes:
        data = os.pread(self._handle(shard), size, offset)
        if len(data) < size:
            raise OSError(f"the shard ends {size - len(data)} bytes too early: was it changed during the run?")
        return data

    def will_need(self, shard: str, offset: int, size: int) -> None:
        # a handle of its own: a thread reads ahead, and would close one that the main thread reads from
        handle = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(handle, offset, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)

    def _stamp(self, shard: str) -> np.ndarray:
        try:
            status = os.stat(shard)
        except OSError as error:
            raise UserError(
                f"asked for the shard {shard}, which cannot be opened ({error.strerror}); check the path or pattern"
            ) from None
        return np.array([VERSION, status.st_size, status.st_mtime_ns])

    def _index_paths(self, shard: str) -> tuple[Path, Path]:
        return index_path(Path(shard)), cached_index_path(os.path.abspath(shard))

    def _handle(self, shard: str) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": OrderedDict()}

    def __del__(self) -> None:
        for handle in getattr(self, "_open", {}).values():
            os.close(handle)
