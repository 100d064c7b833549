"""CLOC on two ranks under DDP: `python -m tests.methods.region_ranks FOLDER TEXT`. Each writes to FOLDER/RANK.pt.

A process of its own, which forks before it has threads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from locfast.random import Keys
from tests.forked import run_ranks
from tests.methods.region_pairs import batch_of, make

RANKS = 2
CASES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "default": ([0, 1, 2, 3, 4, 5, 6, 7], {}),
    "roi": ([0, 1, 2, 3, 4, 5, 6, 7], {"prompter": "roi", "grounding": False}),
    "uneven": ([0, 1, 4, 6, 2, 3, 5, 5], {}),
}


def at_rank(rank: int, folder: Path, text: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    found = {}
    for name, (rows, fields) in CASES.items():
        own = rows[4 * rank : 4 * rank + 4]
        method = make(text, **fields)
        draw = method.draw(Keys(3, torch.zeros(4, dtype=torch.int64), torch.tensor(own)))
        averaging = DistributedDataParallel(method)  # until after the backward pass
        told = averaging(batch_of(own), draw)
        told["loss"].backward()
        gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        found[name] = {"told": {part: value.detach() for part, value in told.items()}, "gradients": gradients}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def main() -> int:
    folder, text = Path(sys.argv[1]), sys.argv[2]
    return run_ranks(RANKS, lambda rank: at_rank(rank, folder, text))


if __name__ == "__main__":
    sys.exit(main())
