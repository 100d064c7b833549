"""The indexes of many shards: kept ones are read, missing ones made in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from locfast.data.orphan import pool
from locfast.data.sources.stores import Store
from locfast.data.sources.tar_index import TarIndex
from locfast.errors import UserError

LOOKING = 16
"""Threads that read kept indexes: those of a network disk or of URLs are waited for, not computed."""
WORTH_A_FORK = 64 << 20
"""Bytes of shards from which they are scanned in processes: Python's tarfile reads 30000 headers a second and holds
the interpreter's lock, so threads would not help; a fork takes some 20 ms."""


def load_indexes(shards: Sequence[str], store: Store) -> list[TarIndex]:
    """The index of every shard, in their order. UserError for the first that is found missing or broken."""
    indexes: dict[int, TarIndex] = {}
    for number, index in index_all(shards, store):
        if isinstance(index, UserError):
            raise index
        indexes[number] = index
    return [indexes[number] for number in range(len(shards))]


def index_all(
    shards: Sequence[str], store: Store, workers: int | None = None
) -> Iterator[tuple[int, TarIndex | UserError]]:
    """(number of the shard, its index or what is wrong with it), in the order in which they are done.

    `workers` None: as many processes as there are cores, where there is enough to scan; 0 or 1: this process.
    """
    missing: list[int] = []
    size = 0
    with ThreadPoolExecutor(min(LOOKING, len(shards))) as threads:
        looks = threads.map(lambda shard: _try(store.look, shard), shards)
        for number, found in enumerate(looks):
            if isinstance(found, UserError):
                yield number, found
            elif found[1] is not None:
                yield number, found[1]
            else:
                missing.append(number)
                size += found[0]
    if workers is None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = len(os.sched_getaffinity(0)) // ranks if size >= WORTH_A_FORK else 1
    workers = min(workers, len(missing))
    missing = _own_share_first(missing)
    if workers <= 1:
        yield from ((number, _try(_make, store, shards[number])) for number in missing)
    else:
        yield from _in_processes(shards, store, missing, workers)


def _in_processes(
    shards: Sequence[str], store: Store, missing: list[int], workers: int
) -> Iterator[tuple[int, TarIndex | UserError]]:
    # forked as the loader's workers are: a fresh interpreter would import the caller's script
    try:
        with pool(workers) as helpers:
            numbers = {helpers.submit(_try, _make, store, shards[number]): number for number in missing}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
    except BrokenProcessPool:
        raise UserError(
            "asked for the indexes of tar shards, found that a process that reads them had died; most often the "
            "machine ran out of memory: try `python -m locfast.data index` with fewer --workers"
        ) from None


def _own_share_first(missing: list[int]) -> list[int]:
    """The ranks of a run that scan the same shards begin at different ones, and find those of the others done."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = rank * len(missing) // max(1, size)
    return missing[first:] + missing[:first]


def _make(store: Store, shard: str) -> TarIndex:
    return store.look(shard)[1] or store.index(shard)


def _try(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work`, or its UserError as a value: one broken shard does not stop the others."""
    try:
        return work(*arguments)
    except UserError as error:
        return error
