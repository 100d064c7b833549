"""What meets over ranks, on two of them: `python -m tests.models.two_ranks FOLDER`. Each writes to FOLDER/RANK.pt.

A process of its own, which forks before it has threads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from locfast.methods.context_loss import distance
from locfast.models.batch_norm import GlobalBatchNorm1d
from tests.forked import run_ranks

RANKS, ROWS, WIDTH = 2, 12, 8


def rows(number: int = 0) -> Tensor:
    """The whole batch [ROWS, WIDTH], with a mean a thousand times its deviation."""
    return 1000.0 + torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(number))


class Network(nn.Module):
    """A linear layer, batch norm, and a loss that no rank could compute from its share of the statistics."""

    def __init__(self, norm: type[nn.BatchNorm1d]) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))
            self.layer.bias.zero_()
        self.norm = norm(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.layer(x)) ** 3).abs().sum(1).mean()


def keys_and_queries() -> tuple[Tensor, Tensor]:
    p, t = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return p, t


def at_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    mine = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    norm = GlobalBatchNorm1d(WIDTH)
    share = rows()[mine].requires_grad_()
    out = norm(share)
    (out**3).sum().backward()
    network = DistributedDataParallel(Network(GlobalBatchNorm1d), broadcast_buffers=False)
    for number in (1, 2):
        network(rows(number)[mine].double() - 1000).backward()
    norm.eval()
    p, t = keys_and_queries()
    query = p[mine].requires_grad_()
    nce = distance(query, t[mine], "info_nce", 0.2, everywhere=True)
    nce.backward()
    found = {
        "out": out.detach(),
        "grad": share.grad,
        "state": norm.state_dict(),
        "eval": norm(share).detach(),
        "network": {name: p.grad for name, p in network.module.named_parameters()},
        "network state": network.module.norm.state_dict(),
        "nce": nce.detach(),
        "nce grad": query.grad,
        "alone": distance(p[mine], t[mine], "info_nce", 0.2, everywhere=False),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def main() -> int:
    return run_ranks(RANKS, lambda rank: at_rank(rank, Path(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
