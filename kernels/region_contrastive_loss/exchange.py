"""How texts and their gradients travel between ranks, while the ranks compute.

Every rank keeps its own regions. `ring`: texts pass from rank to rank, a block of them in memory at a time, and their
gradients follow one step behind, so that both arrive at home after a full circle. `gather`: every rank gets all texts
at once, and gradients are summed at their owners: fewer messages, memory for all texts and three blocks' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

TEXTS, GRADIENTS = 0, 1
"""Tags of messages."""

_all_gather: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""By the name that newer versions of PyTorch give it."""


class Alone:
    """One rank, which has all texts."""

    rank, size = 0, 1

    def blocks(self, texts: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(owner, texts) of every rank, the own ones first."""
        yield self.rank, texts

    def give(self, owner: int, grad: Tensor) -> None:
        """This rank's share of the gradient of the owner's texts; it is overwritten."""
        self._total = grad

    def total(self) -> Tensor:
        """The gradient of the own texts over all ranks, once every owner got its share."""
        return self._total

    def all(self, own: Tensor) -> Tensor:
        """own [...] of every rank: [size, ...]."""
        return own[None]

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values


class _Group(Alone):
    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def all(self, own: Tensor) -> Tensor:
        result, _ = self._gather(own.contiguous(), False)
        return result

    def _gather(self, own: Tensor, later: bool) -> tuple[Tensor, dist.Work | None]:
        flat = own.new_empty(self.size * len(own), *own.shape[1:])  # the one shape that gloo takes too
        work = _all_gather(flat, own, group=self.group, async_op=later)
        return flat.unflatten(0, (self.size, len(own))), work

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values


class Ring(_Group):
    """Step s of rank r works on the texts of rank r - s."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__(group)
        self._travelling: _Message | None = None

    def blocks(self, texts: Tensor) -> Iterator[tuple[int, Tensor]]:
        for step in range(self.size):
            coming = self._pass_on(texts, TEXTS) if step + 1 < self.size else None
            yield (self.rank - step) % self.size, texts
            if coming is not None:
                texts = coming.wait()

    def give(self, owner: int, grad: Tensor) -> None:
        if self._travelling is not None:
            grad += self._travelling.wait()
        self._travelling = self._pass_on(grad, GRADIENTS)

    def total(self) -> Tensor:
        assert self._travelling is not None
        return self._travelling.wait()

    def _pass_on(self, tensor: Tensor, tag: int) -> _Message:
        ahead, behind = (dist.get_global_rank(self.group, (self.rank + by) % self.size) for by in (1, -1))
        received = torch.empty_like(tensor)
        send = dist.P2POp(dist.isend, tensor, ahead, self.group, tag)
        receive = dist.P2POp(dist.irecv, received, behind, self.group, tag)
        return _Message(dist.batch_isend_irecv([send, receive]), tensor, received)


class _Message:
    """A tensor on its way to the rank ahead while another one comes in; both are held until then."""

    def __init__(self, work: list[dist.Work], sent: Tensor, received: Tensor):
        self._work, self._sent, self._received = work, sent, received

    def wait(self) -> Tensor:
        for work in self._work:
            work.wait()
        return self._received


class Gather(_Group):
    """All texts come in while a rank works on its own; shares of gradients go out while it works on the next ones.

    Sums over ranks have to start in one order everywhere, that of their owners: the own share waits for its turn.
    """

    def __init__(self, group: dist.ProcessGroup):
        super().__init__(group)
        self._shares: dict[int, Tensor] = {}
        self._next = 0
        self._under_way: list[tuple[dist.Work | None, Tensor]] = []

    def blocks(self, texts: Tensor) -> Iterator[tuple[int, Tensor]]:
        every, work = self._gather(texts, True)
        yield self.rank, texts
        _wait(work)
        for owner in range(self.size):
            if owner != self.rank:
                yield owner, every[owner]

    def give(self, owner: int, grad: Tensor) -> None:
        if owner == self.rank:
            self._total = grad
        self._shares[owner] = grad
        while self._next in self._shares:
            share, target = self._shares.pop(self._next), dist.get_global_rank(self.group, self._next)
            work = dist.reduce(share, target, group=self.group, async_op=True)
            self._under_way.append((work, share))
            self._next += 1
            if len(self._under_way) > 2:  # or the shares of all owners would be in memory
                _wait(self._under_way.pop(0)[0])

    def total(self) -> Tensor:
        for work, _ in self._under_way:
            _wait(work)
        return self._total


def _wait(work: dist.Work | None) -> None:
    assert work is not None  # as only ranks outside the group get
    work.wait()
