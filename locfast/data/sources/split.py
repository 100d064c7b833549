"""Holding out a part of a source."""

from __future__ import annotations

import numpy as np
import torch

from locfast.data.spec import Record, Source
from locfast.errors import UserError
from locfast.random import permute


def sample_name(source: Source, index: int) -> str:
    """What to call a sample that may not even be readable."""
    name = getattr(source, "name", None)
    return name(index) if callable(name) else f"sample {index} of {source!r}"


def groups(source: Source) -> np.ndarray | None:
    """Where the groups of a source (its shards) begin: ascending indices, the first one 0; None where it has none."""
    ask = getattr(source, "groups", None)
    return ask() if callable(ask) else None


def _regroup(starts: np.ndarray | None, size: int) -> np.ndarray | None:
    """Starts without those of groups that lost all of their samples."""
    return None if starts is None else np.unique(starts[starts < size])


class Chosen:
    """The samples `indices` of a source, in that order."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return sample_name(self.source, int(self.indices[index]))

    def read(self, index: int) -> Record:
        return self.source.read(int(self.indices[index]))

    def groups(self) -> np.ndarray | None:
        starts = groups(self.source)
        return _regroup(None if starts is None else np.searchsorted(self.indices, starts), len(self))

    def __repr__(self) -> str:
        return f"{len(self)} of {self.source!r}"


class Without:
    """A source without the samples `out` (sorted): stores only what is left out."""

    def __init__(self, source: Source, out: np.ndarray) -> None:
        self.source = source
        self._length = len(source) - len(out)
        # How many samples that stay lie before each one that is left out.
        self._before = out - np.arange(len(out))

    def _index(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return index + int(np.searchsorted(self._before, index, side="right"))

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return sample_name(self.source, self._index(index))

    def read(self, index: int) -> Record:
        return self.source.read(self._index(index))

    def groups(self) -> np.ndarray | None:
        starts = groups(self.source)
        if starts is None:
            return None
        # `out` of the constructor again: a start moves down by how many were left out before it
        out = self._before + np.arange(len(self._before))
        return _regroup(starts - np.searchsorted(out, starts), len(self))

    @property
    def can_look_ahead(self) -> bool:
        return getattr(self.source, "can_look_ahead", False)

    def will_need(self, first: int, end: int) -> None:
        self.source.will_need(self._index(first), self._index(end - 1) + 1)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{len(self)} of {self.source!r}"


def hold_out(
    source: Source, *, share: float | None = None, count: int | None = None, seed: int = 0
) -> tuple[Source, Source]:
    """Split off `count` samples (or a `share`, at least one) by a fixed pseudo-random permutation: (train, held out).

    Both keep the source's order. Raises UserError when one side would be empty.
    """
    if (share is None) == (count is None):
        raise TypeError("hold_out takes either share or count")
    size = len(source)
    if count is None:
        count = max(1, round(size * share)) if share else 0
    if not 0 < count < size:
        raise UserError(
            f"asked to hold out {count} of {size} samples of {source!r}, which leaves none on one side; "
            "hold out fewer, or give a validation source of its own (--val)"
        )
    out = permute(torch.arange(count), size, seed, 0, "hold_out").sort().values.numpy()
    return Without(source, out), Chosen(source, out)
