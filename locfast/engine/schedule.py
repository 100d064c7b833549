"""How long a run is, how its batches are cut over ranks and micro-batches, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from locfast.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The steps of a run over one continuous stream of samples: step k takes positions k * batch to (k+1) * batch - 1.

    A step's positions are cut into `accumulation` rounds of `ranks` micro-batches, so that ranks and micro-batches
    change who computes what, never what is computed.
    """

    steps: int
    batch: int
    micro_batch: int
    ranks: int
    rank: int
    samples: int

    @staticmethod
    def of(
        samples: int,
        batch: int,
        micro_batch: int | None,
        ranks: int = 1,
        rank: int = 0,
        epochs: float | None = None,
        steps: int | None = None,
    ) -> Plan:
        """A plan for `samples` samples. UserError when the batch does not divide."""
        if batch % ranks:
            low = batch - batch % ranks
            raise UserError(
                f"--batch-size {batch} is the global batch and {ranks} ranks share it, but {batch} is not divisible by "
                f"{ranks}. Use --batch-size {' or '.join(str(b) for b in (low, low + ranks) if b)}."
            )
        micro_batch = micro_batch or batch // ranks
        if (batch // ranks) % micro_batch:
            share = batch // ranks
            divisors = [d for d in range(1, share + 1) if share % d == 0]
            near = min(divisors, key=lambda d: (abs(d - micro_batch), d))
            raise UserError(
                f"--micro-batch {micro_batch}: each of {ranks} ranks has {share} images of the global batch {batch}, "
                f"which is not divisible by {micro_batch}. Use --micro-batch {near}, or another --batch-size."
            )
        if steps is None:
            steps = max(1, round((epochs or 1) * samples / batch))
        return Plan(steps, batch, micro_batch, ranks, rank, samples)

    @property
    def accumulation(self) -> int:
        return self.batch // (self.ranks * self.micro_batch)

    def micro_batches(self, start: int) -> Iterator[Tensor]:
        """Positions [micro_batch] int64 of this rank's micro-batches, from step `start` to the end of the run."""
        for step in range(start, self.steps):
            for round_ in range(self.accumulation):
                first = self.first_position(step, round_)
                yield torch.arange(first, first + self.micro_batch)

    def first_position(self, step: int, round_: int) -> int:
        """Where this rank's micro-batch number `round_` of a step begins in the stream."""
        return step * self.batch + (round_ * self.ranks + self.rank) * self.micro_batch

    def epochs_done(self, step: int) -> float:
        return step * self.batch / self.samples

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, is over after `step` steps."""
        return step == self.steps or math.floor(self.epochs_done(step)) > math.floor(self.epochs_done(step - 1))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, final_ratio: float = 0.1) -> float:
    """Learning rate of step number `step` (from 0): linear from zero to `peak`, then a cosine to final_ratio * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
