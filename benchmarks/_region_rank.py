"""Real ranks of the region losses, over gloo on this machine: what each sends and keeps, counted.

`counted` starts them; a process each, which meet through a file and so cross no socket that is counted.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _region_cost import Setting
from _region_count import calls, tcp_bytes
from torch import Tensor

from locfast.kernels.region_contrastive_loss import region_contrastive_loss, region_sigmoid_loss
from locfast.kernels.region_contrastive_loss.exchange import Gather, Ring
from tests.kernels.live_bytes import LiveBytes


def counted(asked: list[Setting]) -> list[list[dict[str, Any]]]:
    """What every rank counted at each of the settings, which have as many ranks. Raises RuntimeError where one fails.

    Of forward and backward: calls [kind, bytes, times], bytes sent and received, bytes that the exchange holds at the
    most; and bytes kept between them.
    """
    ranks, told = asked[0].ranks, json.dumps([asdict(at) for at in asked])
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([sys.executable, __file__, str(rank), folder, told], env=environment)
            for rank in range(ranks)
        ]
        ended = [process.wait() for process in processes]
        if any(ended):
            raise RuntimeError(f"ranks ended with {ended}; what they said stands above")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return [list(of_ranks) for of_ranks in zip(*found, strict=True)]


def main(rank: int, folder: Path, asked: list[Setting]) -> None:
    """One rank's part."""
    ranks = asked[0].ranks
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    meetings = itertools.count()

    def meet() -> None:
        here = next(meetings)
        store.set(f"{here}/{rank}", "here")
        store.wait([f"{here}/{other}" for other in range(ranks)])

    results = [one_setting(at, rank, meet) for at in asked]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    meet()
    dist.destroy_process_group()


def one_setting(at: Setting, rank: int, meet: Callable[[], None]) -> dict[str, Any]:
    dtype, generator = getattr(torch, at.dtype), torch.Generator().manual_seed(rank)
    x, y = (torch.randn(at.rows, at.width, generator=generator).to(dtype) for _ in range(2))
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0)
    leaves = [x.requires_grad_(), scale, *([y.requires_grad_()] if at.trains_texts else [])]
    options: dict[str, Any] = {
        "logit_scale": scale,
        "filter_threshold": 0.9 if at.filters else None,
        "group": dist.group.WORLD,
        "exchange": at.exchange,
        "keep_filter": at.keeps_filter,
        "backend": at.backend,
    }

    def forward() -> Tensor:
        if at.form == "contrastive":
            return region_contrastive_loss(x, y, **options)
        return region_sigmoid_loss(x, y, logit_bias=bias, **options)

    forward()  # ranks agree on what they call with, and connect
    loss, ahead = count(forward, meet)
    kept = storage_bytes(loss.grad_fn.saved_tensors, beside=(x, y, scale, bias))
    _, back = count(lambda: torch.autograd.grad(loss, leaves), meet)
    return {"forward": ahead, "backward": back, "kept": kept, "held": held(at)}


def count(run: Callable[[], Any], meet: Callable[[], None]) -> tuple[Any, dict[str, Any]]:
    """What it returns, and what this rank sends and receives meanwhile; all ranks are done when one is counted."""
    meet()
    before = tcp_bytes()
    meet()
    with calls() as found:
        result = run()
    meet()
    sent, received = (after - earlier for after, earlier in zip(tcp_bytes(), before, strict=True))
    return result, {"calls": [[*key, times] for key, times in found.items()], "sent": sent, "received": received}


def storage_bytes(tensors: tuple[Tensor | None, ...], beside: tuple[Tensor, ...]) -> int:
    given = {tensor.untyped_storage().data_ptr() for tensor in beside}
    return sum(x.nbytes for x in tensors if x is not None and x.untyped_storage().data_ptr() not in given)


def held(at: Setting) -> dict[str, int]:
    """Of the exchange alone, without what works on what it brings. A mode sees no further than an op's door."""
    found = {}
    for direction, gives in (("forward", False), ("backward", at.trains_texts)):
        ranks = {"ring": Ring, "gather": Gather}[at.exchange](dist.group.WORLD)
        with LiveBytes() as watch:
            texts = torch.zeros(at.rows, at.width, dtype=getattr(torch, at.dtype))
            for owner, _ in ranks.blocks(texts):
                if gives:
                    ranks.give(owner, torch.zeros(at.rows, at.width))
            if gives:
                ranks.total()
        found[direction] = watch.most - texts.nbytes
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), [Setting(**one) for one in json.loads(sys.argv[3])])
