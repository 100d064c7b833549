"""The order of samples: a pure function of (seed, position), computed and never iterated to, so that a resume jumps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from locfast.data.sources.ahead import Ahead, can_look_ahead, in_background
from locfast.data.sources.split import groups
from locfast.data.spec import Source
from locfast.errors import UserError
from locfast.random import Keys, permute, random_words

Shuffle = Literal["auto", "full", "blocks"]

MAX_PROBES = 100
"""How many replacements of one unreadable sample are tried before the run stops."""
BLOCK = 64
"""Like BUFFER, a part of the order itself: with another number, runs on shards would not go on as they began.
Neighbouring samples that stay together until the buffer. At 100 KB an image that is 6 MB: a spinning disk (10 ms a
seek, 150 MB/s) spends four fifths of its time reading, where single images would leave it at 6 %."""
BUFFER = 8192
"""Samples that are mixed with each other: parts of 128 blocks, so a batch of 1024 holds 8 of each on average. At 100 KB
an image they are 0.8 GB, which the page cache keeps until the last of them is read."""
CHUNK = 8192
"""Blocks whose random words are made at a time: they stay in the cache, and torch takes one thread for them."""


class Order:
    """A continuous stream of samples: position p lies in epoch p // size, every epoch is its own permutation.

    Batch k of a run holds the positions k * B .. (k + 1) * B - 1, across the ends of epochs.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise UserError("asked for an order of no samples: the data source is empty; choose another --data")
        self.size, self.seed = size, seed

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Epoch and dataset index of every position: [B] int64 -> ([B] int64, [B] int64)."""
        epoch = position // self.size
        return epoch, permute(position % self.size, self.size, self.seed, epoch)

    def replacements(self, position: int) -> list[int]:
        """Dataset indices to try, in this order, when the sample at `position` cannot be read; all different.

        They are the start of a permutation that belongs to `position` alone, so neither workers nor ranks nor what
        else failed can change them.
        """
        probes = torch.arange(min(MAX_PROBES, self.size))
        return permute(probes, self.size, self.seed, position & 0xFFFFFFFF, "replacement").tolist()

    def __repr__(self) -> str:
        return f"every epoch is a permutation of all {self.size} samples"


class BlockOrder(Order):
    """An order that reads neighbours together: blocks are permuted, then samples inside a buffer of some blocks.

    Every group (a shard) is cut into blocks of `block` neighbours, its last one shorter; so no block spans two shards.
    An epoch is all blocks of all groups, one behind the other, in a keyed permutation of that epoch. This row of
    samples is cut into buffers of `buffer` places (the last one shorter; a block may end in the next buffer), and in
    each buffer the samples are permuted by a permutation of its own. A source that fits a buffer is shuffled in full.

    `starts` are the indices at which a group begins, ascending, the first one 0. An epoch's table of blocks (16 bytes a
    block) is made when it is first asked for: 0.4 s for ten million samples, 1.7 s for a hundred million, on one core.
    """

    def __init__(
        self, size: int, seed: int, starts: np.ndarray | None = None, *, block: int = BLOCK, buffer: int = BUFFER
    ) -> None:
        super().__init__(size, seed)
        self.where = "one row" if starts is None else f"{len(starts)} shards"
        starts = np.zeros(1, dtype=np.int64) if starts is None else starts
        lengths = np.diff(starts, append=size)
        counts = -(-lengths // block)
        before = np.cumsum(counts) - counts
        nth = np.arange(counts.sum()) - np.repeat(before, counts)
        self.starts = np.repeat(starts, counts) + block * nth
        """First index of every block, ascending: [blocks] int64."""
        self.block, self.buffer = block, buffer
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        epoch, place = position // self.size, position % self.size
        place = self._mixed(epoch, place)
        index = torch.empty_like(place)
        for one in epoch.unique().tolist():
            here = epoch == one
            starts, ends = self._table(one)
            block = torch.searchsorted(ends, place[here], right=True)
            # an index lies as far behind its block's start as its place behind the end of the block before
            index[here] = starts[block] + place[here] - torch.where(block > 0, ends[block - 1], 0)
        return epoch, index

    def due(self, first: int, end: int) -> list[int]:
        """The blocks (places in `starts`) that begin at the places first .. end - 1 of the row, over all epochs."""
        found: list[int] = []
        for epoch in range(first // self.size, (end - 1) // self.size + 1):
            starts, ends = self._table(epoch)
            begin = torch.tensor([first, end]) - epoch * self.size
            # the block behind an end begins there; the first one of an epoch begins behind no end
            low, high = (torch.searchsorted(ends, begin.clamp(max=self.size)) + (begin > 0)).tolist()
            found += torch.searchsorted(torch.from_numpy(self.starts), starts[low:high]).tolist()
        return found

    def _mixed(self, epoch: Tensor, place: Tensor) -> Tensor:
        """Where each place of an epoch's row of blocks is taken from: another place of the same buffer."""
        buffer = place // self.buffer
        first = buffer * self.buffer
        # the running number of a buffer keys its permutation, as 32 bits: they come round after 3e13 samples
        number = (epoch * -(-self.size // self.buffer) + buffer) & 0xFFFFFFFF
        mixed = torch.empty_like(place)
        whole = first + self.buffer <= self.size
        for here, length in ((whole, self.buffer), (~whole, self.size % self.buffer)):
            if bool(here.any()):
                inside = permute(place[here] - first[here], length, self.seed, number[here], "order.buffer")
                mixed[here] = first[here] + inside
        return mixed

    def _table(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Blocks in the order of an epoch, [blocks] int64: their first indices, and the places at which they end."""
        if epoch not in self._tables:
            while len(self._tables) > 2:  # a batch may lie in two epochs, and blocks of a third be due
                del self._tables[next(iter(self._tables))]
            starts = torch.from_numpy(self.starts)
            lengths = torch.from_numpy(np.diff(self.starts, append=self.size))
            chosen = _sorted_by_chance(len(starts), self.seed, epoch)
            self._tables[epoch] = starts[chosen], lengths[chosen].cumsum(0)
        return self._tables[epoch]

    def __repr__(self) -> str:
        return (
            f"every epoch permutes {len(self.starts)} blocks of {self.block} neighbours from {self.where}, then "
            f"samples inside buffers of {self.buffer}"
        )


def _sorted_by_chance(size: int, seed: int, epoch: int) -> Tensor:
    """A keyed permutation of 0 .. size - 1 as a table: for all of it, sorting random words is faster than `permute`."""
    words = []
    for part in torch.arange(size).split(CHUNK):
        high, low = random_words(Keys(seed, torch.full_like(part, epoch), part), "order.block", 2).unbind(1)
        words.append((high << 31) | (low >> 1))
    return torch.argsort(torch.cat(words), stable=True)


def pick_shuffle(shuffle: Shuffle, source: Source) -> Literal["full", "blocks"]:
    """What auto means for a source: blocks where it lies in shards, else full."""
    if shuffle == "auto":
        return "full" if groups(source) is None else "blocks"
    return shuffle


def arrange(source: Source, seed: int, shuffle: Shuffle = "auto") -> tuple[Source, Order]:
    """The order in which `source` is shown, and the source as it is best read in that order."""
    if pick_shuffle(shuffle, source) == "full":
        return source, Order(len(source), seed)
    order = BlockOrder(len(source), seed, groups(source))
    return (Ahead(source, order.starts) if can_look_ahead(source) else source), order


def foresee(source: Source, order: Order, positions: Iterable[Tensor]) -> Iterable[Tensor]:
    """`positions` as they are; as they are asked for, the disk is told of the blocks that are due one buffer later.

    All blocks of a buffer are touched within its first hundreds of samples: fetched no sooner, they would be waited
    for, and the disk would rest for the remainder of the buffer.
    """
    if isinstance(source, Ahead) and isinstance(order, BlockOrder) and order.size > order.buffer:
        return _foresee(source, order, positions)
    return positions  # also for a source that fits a buffer: after its first epoch the page cache has it


def _foresee(source: Ahead, order: BlockOrder, positions: Iterable[Tensor]) -> Iterator[Tensor]:
    with in_background(source.fetch) as fetch:
        for position in positions:
            first, end = int(position[0]), int(position[-1]) + 1
            if end - first == len(position):  # places of the stream one behind the other, as a run's are
                for block in order.due(first + order.buffer, end + order.buffer):
                    fetch(block)
            yield position
