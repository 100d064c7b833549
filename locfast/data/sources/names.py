"""Millions of file names in two arrays."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np

CHUNK = 1 << 16
"""Names that are Python objects at a time."""


class Names:
    """An immutable sequence of strings, one blob and their ends.

    A Python list of 14 million paths costs 1.5 GB, and again in every forked worker, because counting references
    writes to the pages that fork shares. This costs the bytes of the names, once, and hardly more while it is made.
    """

    def __init__(self, names: Iterable[str]) -> None:
        left, lengths = iter(names), [np.zeros(0, dtype=np.int32)]
        self._blob = bytearray()
        while encoded := [name.encode("utf-8", "surrogateescape") for name in islice(left, CHUNK)]:
            self._blob += b"".join(encoded)
            lengths.append(np.array([len(name) for name in encoded], dtype=np.int32))
        self._ends = np.cumsum(np.concatenate(lengths), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])].decode("utf-8", "surrogateescape")
