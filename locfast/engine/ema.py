"""An exponential moving average of the trained weights (`--ema`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from locfast.methods.base import Method


class Average:
    """average <- decay * average + (1 - decay) * weights after every step, starting from the first weights."""

    def __init__(self, method: Method, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach() for n, p in method.named_parameters() if p.requires_grad}
        self.tensors = {name: weight.clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self.tensors.values()), list(self.weights.values()), 1 - self.decay)

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the method runs with the averaged weights."""
        kept = {name: weight.clone() for name, weight in self.weights.items()}
        _copy(self.tensors, self.weights)
        try:
            yield
        finally:
            _copy(kept, self.weights)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
