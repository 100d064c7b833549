"""What `--overwrite` has yet to remove. It stands in vesl.json until it is gone, or a kill would leave old labels.

A rank that was begun without `--overwrite`, or with other ranks than before, finds it there and removes it first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypedDict

from locfast.vesl.folder import STAGES, Folder

NAME = "forgetting"


class Pending(TypedDict):
    """The `left` ones of so many ranks have yet to forget what they made in a stage and in those after it."""

    stage: str
    ranks: int
    left: list[int]


def check_form(pending: Any) -> None:
    """Raises ValueError where it is no list of `Pending`."""
    good = isinstance(pending, list) and all(
        isinstance(one, dict)
        and one.keys() == Pending.__annotations__.keys()
        and one["stage"] in STAGES
        and isinstance(one["left"], list)
        and all(type(number) is int for number in one["left"])
        and type(one["ranks"]) is int
        and one["ranks"] > 0
        for one in pending
    )
    if not good:
        raise ValueError(f'"{NAME}" is no list of stages, ranks and those left')


def waits(pending: Iterable[Pending], stage: str, folder: Folder) -> bool:
    """Whether this rank has yet to forget exactly this."""
    return any(one["stage"] == stage and one["ranks"] == folder.ranks and folder.rank in one["left"] for one in pending)


def begun(pending: Iterable[Pending], stage: str, ranks: int) -> list[Pending]:
    """What is pending when all ranks are to forget a stage too, which covers those after it."""
    earlier = [one for one in pending if STAGES.index(one["stage"]) < STAGES.index(stage)]
    return [*earlier, {"stage": stage, "ranks": ranks, "left": list(range(ranks))}]


def without(pending: Iterable[Pending], folder: Folder) -> list[Pending]:
    """What is pending once this rank has forgotten what it had to."""
    kept: list[Pending] = []
    for one in pending:
        left = [rank for rank in one["left"] if rank != folder.rank or one["ranks"] != folder.ranks]
        if left:
            kept.append({**one, "left": left})
    return kept


def forget(folder: Folder, one: Pending, ranks: Iterable[int]) -> None:
    for rank in ranks:
        replace(folder, rank=rank, ranks=one["ranks"]).forget(one["stage"])
