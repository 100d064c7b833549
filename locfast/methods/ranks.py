"""What a loss over the whole global batch needs of other ranks; all other methods know nothing of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist
from torch import Tensor

_ALONE = ContextVar("alone", default=False)


def process_group(training: bool) -> dist.ProcessGroup | None:
    """All ranks, where there are several and a step is taken; else None.

    Held-out batches stand alone: ranks hold different numbers of them, and one that waits for another waits forever.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several and training and not _ALONE.get() else None


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process sees its own batch and no other rank's: to ask which of its samples is at fault."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def with_gradient(value: Tensor, source: Tensor) -> Tensor:
    """A scalar that is `value` to the bit and whose gradient is that of `source`."""
    return value.detach() + (source - source.detach())


def total(numbers: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Numbers summed over ranks; without a gradient. All ranks call it."""
    if group is not None:
        dist.all_reduce(numbers, group=group)
    return numbers
