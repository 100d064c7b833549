"""How many FLOPs a step takes, and how many a GPU can do: model FLOPs utilisation."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from locfast.engine.precision import autocast
from locfast.methods.base import Batch, Method

CEILINGS = {("NVIDIA H200", "bf16"): 790e12, ("NVIDIA H100 80GB HBM3", "bf16"): 780e12}
"""By GPU name and precision, FLOP/s of a product of random matrices of 8192 x 8192, measured with torch 2.11 (the data
sheet says 989e12)."""


def ceiling(device: torch.device, precision: str) -> float | None:
    """The matrix-product rate of the device in `precision`, FLOP/s, or None where nobody measured it."""
    if device.type != "cuda":
        return None
    return CEILINGS.get((torch.cuda.get_device_name(device), precision))


def count_flops(method: Method, batch: Batch, draw: Any, precision: str) -> int:
    """FLOPs of one forward and backward pass; leaves gradients, weights and buffers (running means) as they are.

    A pass of its own: to count inside a training step would run that step without torch.compile.
    """
    parameters = [p for p in method.parameters() if p.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in method.buffers()]
    with FlopCounterMode(display=False) as counter:
        with autocast(method.device, precision):
            loss = method(batch, draw)["loss"]
        torch.autograd.grad(loss, parameters, allow_unused=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    return counter.get_total_flops()
