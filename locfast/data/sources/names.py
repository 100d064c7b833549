"""Millions of file names in two arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Names:
    """An immutable sequence of strings, one blob and their ends.

    A Python list of 14 million paths costs 1.5 GB, and again in every forked worker, because counting references
    writes to the pages that fork shares. This costs the bytes of the names, once.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._blob = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])].decode("utf-8", "surrogateescape")
