"""Tensors that meet over all ranks inside a forward pass: sums with gradient, and rows without."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """`x` added up over all ranks. Its gradient is that of the sum of all ranks' losses."""
    return _Sum.apply(x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


@torch.no_grad()
def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The rows [R, C] of every rank, in the order of ranks [ranks * R, C], and where this rank's begin.

    No gradient passes. Every rank has the same number of rows.
    """
    ranks = num_ranks()
    if ranks == 1:
        return rows, 0
    everyone = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(everyone, rows.contiguous())
    return torch.cat(everyone), dist.get_rank() * len(rows)
