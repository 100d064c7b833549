"""The order of samples: a pure function of (seed, position), computed and never iterated to, so that a resume jumps."""

from __future__ import annotations

import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.random import permute

MAX_PROBES = 100
"""How many replacements of one unreadable sample are tried before the run stops."""


class Order:
    """A continuous stream of samples: position p lies in epoch p // size, every epoch is its own permutation.

    Batch k of a run holds the positions k * B .. (k + 1) * B - 1, across the ends of epochs.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise UserError("asked for an order of no samples: the data source is empty; choose another --data")
        self.size, self.seed = size, seed

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Epoch and dataset index of every position: [B] int64 -> ([B] int64, [B] int64)."""
        epoch = position // self.size
        return epoch, permute(position % self.size, self.size, self.seed, epoch)

    def replacements(self, position: int) -> list[int]:
        """Dataset indices to try, in this order, when the sample at `position` cannot be read; all different.

        They are the start of a permutation that belongs to `position` alone, so neither workers nor ranks nor what
        else failed can change them.
        """
        probes = torch.arange(min(MAX_PROBES, self.size))
        return permute(probes, self.size, self.seed, position & 0xFFFFFFFF, "replacement").tolist()
