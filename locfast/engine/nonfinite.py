"""A loss or gradient that is not finite: which images give it, and what a user is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from locfast.engine.precision import autocast
from locfast.errors import UserError

if TYPE_CHECKING:
    from locfast.engine.loop import Trainer

MOST = 512
"""At most so many images of a rank are tried alone."""


@dataclass(frozen=True)
class MicroBatch:
    """What is kept of a micro-batch until its step is known to be sound."""

    position: int  # of its first sample
    index: Tensor  # [B]
    epoch: Tensor  # [B]
    loss: Tensor  # scalar


@dataclass(frozen=True)
class Found:
    """The step that failed: `record` goes into the state of its checkpoint."""

    step: int
    record: dict[str, Any]
    images: list[str]

    def error(self, saved: Path) -> UserError:
        what = f"loss {self.record['loss']}, gradient norm {self.record['grad_norm']}"
        alone = self.record["alone"]
        index = alone or self.record["index"]
        shown = ", ".join(map(str, index[:32])) + (f" and {len(index) - 32} more" if len(index) > 32 else "")
        blame = "which are not finite alone either" if alone else "none of which is at fault alone"
        names = f" ({', '.join(self.images)})" if self.images else ""
        return UserError(
            f"Step {self.step + 1} is not finite: {what}. Image indices {shown}{names}, {blame}. Weights and optimiser "
            f"from before the step are in {saved}: move that folder to checkpoints/ and --resume repeats the step. "
            "A lower --lr, --precision fp32 or taking the images out are what usually helps."
        )


def explain(run: Trainer, step: int, seen: list[MicroBatch], numbers: dict[str, float]) -> Found:
    """Find the images of a step whose loss or gradient is not finite. All ranks call it, each for its own images."""
    suspects = [micro for micro in seen if not math.isfinite(micro.loss.item())]
    if not suspects and math.isfinite(numbers["loss"]):
        suspects = seen  # only the gradient is at fault: any image may be
    positions = torch.cat([torch.arange(m.position, m.position + len(m.index)) for m in suspects] or [torch.empty(0)])
    mine = {
        "position": positions.long().tolist(),
        "index": [i for micro in suspects for i in micro.index.tolist()],
        "epoch": [e for micro in suspects for e in micro.epoch.tolist()],
        "alone": _each_alone(run, positions.long()[:MOST]),
    }
    every = run.world.gather(mine)
    record: dict[str, Any] = {key: [value for rank in every for value in rank[key]] for key in mine}
    record |= {"seed": run.config.seed, "loss": numbers["loss"], "grad_norm": numbers["grad_norm"]}
    return Found(step, record, [_name(run, index) for index in record["alone"][:8]])


def _each_alone(run: Trainer, positions: Tensor) -> list[int]:
    """Dataset indices of those samples that, as a batch of one, have a loss or gradient that is not finite."""
    parameters = run.parameters
    bad = []
    for batch in run.loader.batches(positions.split(1) if len(positions) else []):
        draw = run.method.draw(run.method.keys(run.config.seed, batch))
        with autocast(run.device, run.precision):
            loss = run.method.alone(batch, draw)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        finite = [loss.isfinite(), *(g.isfinite().all() for g in gradients if g is not None)]
        if not bool(torch.stack(finite).all()):
            bad.append(int(batch["index"][0]))
    return bad


def _name(run: Trainer, index: int) -> str:
    try:
        return run.source.read(index).name or f"sample {index}"
    except Exception:
        return f"sample {index}"
