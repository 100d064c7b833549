"""Ranks: who we are under torchrun, sums over all ranks, and work that only the first rank does."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from locfast.cli import no_room
from locfast.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes of one run, and which of them this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Small Python values of all ranks, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank alone, while the others wait; its result or its error reaches every rank."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                answer[0] = work()
            except Exception as error:
                failure = error
                told = isinstance(error, UserError)
                answer[1] = str(error) if told else no_room(error) or f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(answer, src=0)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def environment() -> World:
    """This process as torchrun describes it; a world of one without torchrun. Raises UserError for what is no rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "WORLD_SIZE" not in os.environ:
        return World()
    told = {name: os.environ.get(name, "0") for name in names}
    try:
        rank, size, local_rank = map(int, told.values())
        good = 0 <= rank < size and local_rank >= 0
    except ValueError:
        good = False
    if not good:
        found = " ".join(f"{name}={value}" for name, value in told.items())
        raise UserError(f"found {found} in the environment; ranks count from 0 to below WORLD_SIZE")
    return World(rank, size, local_rank)


def join(world: World, device: torch.device) -> None:
    """Meet the other ranks: NCCL between GPUs, gloo between CPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=world.rank, world_size=world.size)
