"""Rows as e4m3 with one scale each, in one pass over memory: the operands of an fp8 matrix product."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _backend
from . import reference

OP = "quantize_rows"


def quantize_rows(x: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Round every row to e4m3, scaled so that its largest magnitude becomes 448, the largest number there.

    x [..., K] in fp32, bf16 or fp16  ->  codes [..., K] in torch.float8_e4m3fn, scales [..., 1] in fp32; a row is about
    codes * scale. All in fp32: a = max(max |x|, 2^-100), scale = a * (1/448 rounded to fp32), codes = x * (448 / a),
    rounded to nearest, ties to even. Every step is rounded once, so that a CPU, a GPU and every backend give the same
    bits. Codes cannot overflow. Rows of zeros give zeros; a row that holds NaN or infinity has a NaN among its codes,
    so that all it is multiplied with becomes NaN. Not differentiable.

    Inside torch.compile `auto` is plain PyTorch, which the compiler fuses with what makes x; its division may be off by
    2 ulp, and a code then by one step where x * (448 / a) lay that near to the middle between two.
    Raises ValueError for dtypes that do not fit, BackendError for a named backend that cannot run.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.ndim == 0:
        raise ValueError(f"quantize_rows: x must be [..., K] in fp32, bf16 or fp16, got {list(x.shape)} in {x.dtype}")
    x = x.detach()
    if backend == "auto" and torch.compiler.is_compiling():
        return reference.quantize_rows(x)
    if _backend.choose(OP, x.device, x.dtype, backend) == "reference":
        return reference.quantize_rows(x)
    return torch.ops.locfast.quantize_rows(x)


def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever holds the tensors
        return importlib.import_module(".triton", __name__).quantize_rows(x)


op = torch.library.custom_op("locfast::quantize_rows", _forward, mutates_args=())


@op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return codes, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@register_flop_formula(torch.ops.locfast.quantize_rows)
def _flops(*args: object, **kwargs: object) -> int:
    """None by the usual count, which takes matrix products alone."""
    return 0


_backend.register(OP, {"triton": _backend.triton_fp8_probe, "reference": _backend.anywhere})

__all__ = ["quantize_rows"]
