"""Networks that follow others: an exponential moving average that is run, not only kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class MomentumCopy(nn.Module):
    """Copies of networks that move towards them after every step, without gradients and always in eval mode.

    Parameters and floating-point buffers (the running statistics of batch norm) are averaged, others (its counter)
    copied: in eval mode a copy then computes with averaged statistics, never with those of its own batch.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, copy.deepcopy(network))
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def follow(self, networks: Mapping[str, nn.Module], momentum: float) -> None:
        """copy <- momentum * copy + (1 - momentum) * network, for the networks that were copied, by name."""
        averaged: list[tuple[Tensor, Tensor]] = []
        for name, network in networks.items():
            mine: Any = self.get_submodule(name)
            tensors = zip(
                chain(mine.parameters(), mine.buffers()), chain(network.parameters(), network.buffers()), strict=True
            )
            for own, theirs in tensors:
                if own.is_floating_point():
                    averaged.append((own, theirs.detach()))
                else:
                    own.copy_(theirs)
        torch._foreach_lerp_([own for own, _ in averaged], [theirs for _, theirs in averaged], 1 - momentum)

    def train(self, mode: bool = True) -> MomentumCopy:
        """Stays in eval mode."""
        return super().train(False)


def momentum_at(step: int, steps: int, first: float, last: float) -> float:
    """The momentum of step number `step` (from 1) of `steps`: from `first`, along half a cosine, towards `last`."""
    return last - (last - first) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
