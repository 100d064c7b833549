"""Region losses on four ranks and on two pairs of them: `python -m tests.kernels.region_ranks FOLDER`.

One launch runs every case, because to start ranks takes longer than what they do. Each writes its results to
FOLDER/RANK.pt. A process of its own, which forks before it has threads.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from locfast.kernels.region_contrastive_loss import region_contrastive_loss

from .interpreter import mend_interpreter
from .region_loss_checks import BIAS, FORMS, THRESHOLD, Inputs, make_inputs, on_the_threshold, run, usable

RANKS = 4
ROWS = 96
"""Of the whole batch, however many ranks share them."""
BATCHES = ("uneven", "one side", "on the threshold", "bf16")
WAYS = (("reference", "auto"), ("tiled", "ring"), ("tiled", "gather"), ("triton", "ring"), ("triton", "gather"))
NEEDED = {"regions": (True, False), "texts": (False, True)}


@dataclass(frozen=True)
class Case:
    ranks: int
    form: str
    backend: str
    exchange: str
    batch: str

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.form}, {self.backend}, {self.exchange}, {self.batch}"


CASES = [
    Case(n, form, *way, batch)
    for n, form, way, batch in product((2, 4), FORMS, WAYS, BATCHES)
    if way[0] != "triton" or (n == 2 and batch in ("uneven", "on the threshold"))  # an interpreter takes its time
]


def runs_here(backend: str) -> bool:
    try:
        usable(backend, torch.device("cpu"))
    except pytest.skip.Exception:
        return False
    return True


def whole_batch(name: str) -> tuple[Inputs, Tensor, float]:
    """Inputs of all ranks, which rows are valid, and the threshold. Rows that are not valid hold NaN."""
    valid, threshold = torch.arange(ROWS) % 7 != 3, THRESHOLD
    regions, texts, scale = make_inputs(ROWS, 16, torch.bfloat16 if name == "bf16" else torch.float32)
    if name == "on the threshold":
        texts, threshold = on_the_threshold(ROWS, 48, torch.float32)
        regions = torch.randn(ROWS, 48, generator=torch.Generator().manual_seed(4))
    elif name == "one side":
        valid[ROWS // 2 :] = False  # nothing is valid on the second rank of two, nor on the last two of four
    else:
        valid[ROWS // 4 : ROWS // 2] = False  # nor on the second of four
    regions[~valid], texts[~valid] = float("nan"), float("nan")
    return (regions, texts, scale), valid, threshold


def layer_and_images() -> tuple[torch.nn.Linear, Tensor]:
    """What makes regions of images, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    layer = torch.nn.Linear(12, 16)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return layer, torch.randn(ROWS, 12, generator=generator)


def main(folder: str) -> None:
    torch.multiprocessing.start_processes(_rank, (folder,), RANKS, start_method="fork")


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    mend_interpreter(pytest.MonkeyPatch())
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=RANKS, rank=rank)
    # In the second pair a rank's number in the group is not its number among all.
    groups = {RANKS: dist.group.WORLD, 2: [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]}
    results: dict[Any, Any] = {
        str(case): _results(case, groups[case.ranks]) for case in CASES if runs_here(case.backend)
    }
    for ranks, group in groups.items():
        results[ranks, "ddp"] = _layer_gradients(group)
        for exchange, needed in product(("ring", "gather"), NEEDED):
            results[ranks, exchange, needed] = _one_sided(group, exchange, *NEEDED[needed])
    results["refused"] = _refused(groups[RANKS])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _results(case: Case, group: Any) -> dict[str, Any]:
    """Loss and gradients of the rank's rows; whether a second run and one without kept bits give the same; the bits."""
    inputs, valid, threshold = whole_batch(case.batch)
    own = _share(inputs, group)
    rows = valid.chunk(group.size())[group.rank()]
    options = dict(group=group, exchange=case.exchange)
    found, again, fresh = (
        run(own, case.form, case.backend, rows, threshold, keep_filter=keep, **options) for keep in (True, True, False)
    )
    results: dict[str, Any] = dict(
        found=found,
        again=all(torch.equal(a, b) for a, b in zip(found, again, strict=True)),
        fresh=all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True)),
    )
    if case.backend != "reference":
        bias = None if case.form == "contrastive" else torch.tensor(BIAS)
        rest = (threshold, inputs[0].dtype, group.group_name, case.exchange, True, case.backend)
        results["bits"] = torch.ops.locfast.region_contrastive_loss(*own, bias, rows, *rest)[7]
    return results


def _layer_gradients(group: Any) -> list[Tensor]:
    layer, images = layer_and_images()
    (_, texts, scale), valid, _ = whole_batch("uneven")
    texts, valid, images = (x.chunk(group.size())[group.rank()] for x in (texts, valid, images))
    parallel = DistributedDataParallel(layer, process_group=group)
    loss = region_contrastive_loss(parallel(images), texts, logit_scale=scale, valid=valid, group=group)
    (loss * group.size()).backward()
    return [p.grad for p in layer.parameters()]


def _one_sided(group: Any, exchange: str, *needs: bool) -> list[Tensor | None]:
    inputs, valid, _ = whole_batch("uneven")
    regions, texts, scale = _share(inputs, group)
    for x, needed in zip((regions, texts), needs, strict=True):
        x.requires_grad_(needed)
    rows = valid.chunk(group.size())[group.rank()]
    options = dict(logit_scale=scale, valid=rows, group=group, exchange=exchange, backend="tiled")
    region_contrastive_loss(regions, texts, **options).backward()
    return [regions.grad, texts.grad]


def _refused(group: Any) -> dict[str, str]:
    """What a rank is told where the first one calls otherwise than the others."""
    first, told = group.rank() == 0, {}
    for name, (rows, threshold, exchange, trained) in {
        "rows": (4 if first else 6, 0.9, "ring", True),
        "threshold": (6, None if first else 0.9, "ring", True),
        "exchange": (6, 0.9, "ring" if first else "gather", True),
        "gradients": (6, 0.9, "ring", not first),
    }.items():
        texts = torch.ones(rows, 8, requires_grad=trained)
        options = dict(logit_scale=1.0, filter_threshold=threshold, exchange=exchange, group=group)
        try:
            region_contrastive_loss(torch.ones(rows, 8), texts, **options)
        except ValueError as error:
            told[name] = str(error)
    return told


def _share(inputs: Inputs, group: Any) -> Inputs:
    regions, texts = (x.chunk(group.size())[group.rank()].clone() for x in inputs[:2])
    return regions, texts, inputs[2]


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
