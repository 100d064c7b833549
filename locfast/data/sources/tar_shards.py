"""Tar shards in webdataset's layout, with random access."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from locfast.data.regions.json_form import regions_beside
from locfast.data.sources.indexing import load_indexes
from locfast.data.sources.names import Names
from locfast.data.sources.stores import Disk, Store
from locfast.data.sources.tar_index import FIELDS
from locfast.data.sources.texts import lines
from locfast.data.spec import Record
from locfast.errors import UserError

SLACK = 1 << 16
"""Bytes that may lie between the members of a sample (headers, members not wanted) for them to be read at once."""


class TarShards:
    """All samples of some shards, in the order of the shards and of the members in them.

    Members of a sample share the path up to the first dot of the base name: an image, `.txt` (a text a line), `.json`
    (regions, see `regions_beside`), `.seg.png` (label map). Samples without an image are left out. `store` is where the
    shards lie: files of this machine, or URLs (`Web`). `read` raises OSError for a shard that was removed or shortened
    since.
    """

    def __init__(self, shards: Sequence[str | Path], spec: str = "", store: Store | None = None) -> None:
        self.shards, self.spec = [str(shard) for shard in shards], spec or str(shards[0])
        self.store: Store = store or Disk()
        indexes = load_indexes(self.shards, self.store)
        self._starts = [0, *itertools.accumulate(len(index.keys) for index in indexes)]
        self._keys = Names(key for index in indexes for key in index.keys)
        if not len(self._keys):
            raise UserError(
                f"asked for the shards {self.spec}, found {len(self.shards)} of them, but no image in any; a sample is "
                "KEY.jpg (or another image), with KEY.txt and KEY.json beside it where there is a text or regions"
            )
        # columns of fields that no sample has are left out: 16 bytes a sample instead of 64 where there are only images
        used = [i for i in range(len(FIELDS)) if any((index.place[:, i, 0] >= 0).any() for index in indexes)]
        self._fields = [FIELDS[i] for i in used]
        self._place = np.concatenate([index.place[:, used] for index in indexes])

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        return f"{self.shards[self._shard(index)]}/{self._keys[index]}"

    def groups(self) -> np.ndarray:
        """The first sample of every shard that has any: ascending, int64."""
        return np.unique([start for start in self._starts if start < len(self)])

    @property
    def can_look_ahead(self) -> bool:
        return self.store.can_look_ahead

    @property
    def is_waited_for(self) -> bool:
        return self.store.is_waited_for

    def will_need(self, first: int, end: int) -> None:
        """Have the disk read samples first .. end - 1, all of one shard, while this process does something else."""
        # members of a sample lie together, so the last sample's end is that of the bytes
        places = self._place[[first, end - 1]]
        offset = int(places[..., 0][places[..., 0] >= 0].min())
        self.store.will_need(self.shards[self._shard(first)], offset, int(places.sum(-1).max()) - offset)

    def read(self, index: int) -> Record:
        name = self.name(index)
        parts = self._parts(self.shards[self._shard(index)], self._place[index].tolist())
        try:
            text = parts["text"].decode("utf-8") if "text" in parts else None
            regions = regions_beside(json.loads(parts["regions"])) if "regions" in parts else None
        except UnicodeDecodeError:
            raise OSError("its text or regions are not UTF-8") from None
        except ValueError as error:
            raise OSError(f"its regions cannot be used: {error}") from None
        label_map = parts.get("label_map")
        return Record(parts["image"], name, text=text, regions=regions, label_map=label_map, texts=lines(text))

    def _parts(self, shard: str, places: list[list[int]]) -> dict[str, bytes]:
        """Bytes of the members that a sample has, by field: read in one piece where they lie close together."""
        there = {field: place for field, place in zip(self._fields, places, strict=True) if place[0] >= 0}
        first = min(offset for offset, _ in there.values())
        span = max(offset + size for offset, size in there.values()) - first
        if span > sum(size for _, size in there.values()) + SLACK:
            return {field: self.store.read(shard, *place) for field, place in there.items()}
        data = self.store.read(shard, first, span)
        return {field: data[offset - first : offset - first + size] for field, (offset, size) in there.items()}

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def __repr__(self) -> str:
        return f"{len(self)} images in {len(self.shards)} shards of {self.spec}"
