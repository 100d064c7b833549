"""Tar shards in webdataset's layout, with random access."""

from __future__ import annotations

import bisect
import glob
import itertools
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from locfast.data.sources.names import Names
from locfast.data.sources.tar_index import load_index
from locfast.data.spec import Record
from locfast.errors import UserError

OPEN_SHARDS = 128
"""File handles kept open in a process; the usual limit of a process is 1024."""


def expand(pattern: str) -> list[Path]:
    """Paths that a shard pattern stands for: `shard-{000..012}.tar`, `{a,b}-{0..3}.tar`, `*.tar`, or one path.

    Braces name every shard, so a missing one is found out; a glob takes what is there. Raises UserError for a range
    that makes no sense and a glob without a match.
    """
    parts = re.split(r"(\{[^{}]*\})", pattern)
    if any(brace in part for part in parts[::2] for brace in "{}"):
        raise UserError(
            f"asked for the shards {pattern}, found a brace without its partner; write e.g. shard-{{000..012}}.tar"
        )
    choices = [[part] if i % 2 == 0 else _choices(part[1:-1], pattern) for i, part in enumerate(parts)]
    paths: list[Path] = []
    for one in map("".join, itertools.product(*choices)):
        found = sorted(glob.glob(one)) if any(c in one for c in "*?[") and not os.path.exists(one) else [one]
        if not found:
            raise UserError(f"asked for the shards {pattern}, found no file that fits {one}; check the pattern")
        paths += map(Path, found)
    return paths


def _choices(inside: str, pattern: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = match.groups()
        if int(first) > int(last):
            raise UserError(
                f"asked for the shards {pattern}, found a range that runs down: {{{inside}}}; write {{{last}..{first}}}"
            )
        width = len(first) if first.startswith("0") else 0
        return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise UserError(
        f"asked for the shards {pattern}, found {{{inside}}}, which is neither a range nor a choice; "
        "write {000..012} or {a,b}"
    )


class TarShards:
    """All samples of some shards, in the order of the shards and of the members in them.

    Members of a sample share the path up to the first dot of the base name: an image, `.txt` (text), `.json`
    (regions), `.seg.png` (label map). Samples without an image are left out.
    """

    def __init__(self, shards: Sequence[str | Path], spec: str = "") -> None:
        self.shards, self.spec = [str(shard) for shard in shards], spec or str(shards[0])
        with ThreadPoolExecutor(max_workers=8) as pool:
            indexes = list(pool.map(load_index, map(Path, self.shards)))
        self._starts = [0, *itertools.accumulate(len(index.keys) for index in indexes)]
        self._keys = Names(key for index in indexes for key in index.keys)
        self._place = np.concatenate([index.place for index in indexes])
        self._open: OrderedDict[int, int] = OrderedDict()
        if not len(self._keys):
            raise UserError(
                f"asked for the shards {self.spec}, found {len(self.shards)} of them, but no image in any; a sample is "
                "KEY.jpg (or another image), with KEY.txt and KEY.json beside it where there is a text or regions"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        return f"{self.shards[self._shard(index)]}/{self._keys[index]}"

    def read(self, index: int) -> Record:
        shard, (image, text, regions, label_map) = self._shard(index), self._place[index].tolist()
        caption, objects = self._bytes(shard, text), self._bytes(shard, regions)
        return Record(
            self._bytes(shard, image) or b"",
            self.name(index),
            text=None if caption is None else caption.decode("utf-8"),
            regions=None if objects is None else json.loads(objects),
            label_map=self._bytes(shard, label_map),
        )

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def _bytes(self, shard: int, place: list[int]) -> bytes | None:
        offset, size = place
        if offset < 0:
            return None
        data = os.pread(self._handle(shard), size, offset)
        if len(data) < size:
            raise OSError(f"the shard ends {size - len(data)} bytes too early: was it changed during the run?")
        return data

    def _handle(self, shard: int) -> int:
        """An open file. Reads name their own place (pread), so sharing a handle after a fork does no harm."""
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for handle in getattr(self, "_open", {}).values():
            os.close(handle)

    def __repr__(self) -> str:
        return f"{len(self)} images in {len(self.shards)} shards of {self.spec}"
