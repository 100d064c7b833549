"""Rows of fp32 or bf16 as e4m3 with a scale each, in plain PyTorch: the same bits on every device."""

import torch
from torch import Tensor

LARGEST = 448.0
"""The largest finite number of torch.float8_e4m3fn."""
PER_LARGEST = 9586981 * 2.0**-32
"""1 / 448, rounded to fp32: a product with it is rounded once, everywhere. CUDA turns a division by a number into a
product with its reciprocal and a CPU does not, so that their scales would differ."""
SMALLEST = 2.0**-100
"""What stands for the largest magnitude of a row that has less, zeros above all: 448 / SMALLEST is still finite."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See the op. Written so that torch.compile puts it into one kernel with what makes x: a norm, an activation."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    # tensor by tensor, once a row: the one kind of division that IEEE 754 rounds on a CPU and on a GPU alike
    inverse = torch.full_like(largest, LARGEST) / largest
    return (x * inverse).to(torch.float8_e4m3fn), largest * PER_LARGEST
