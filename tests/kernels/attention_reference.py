"""Soft-capped attention that rounds only what a tensor core must: what a right kernel's error is held against."""

from __future__ import annotations

import torch
from torch import Tensor


class Rounded(torch.autograd.Function):
    """Rounds to a dtype and goes on in fp32, forward and backward: what a tensor core does to its operands."""

    @staticmethod
    def forward(ctx, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class HardwareTanh(torch.autograd.Function):
    """tanh rounded to the 11 bits of tanh.approx.f32, and the derivative 1 - t^2 of that t."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(torch.tanh(value))
        tanh = torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
        ctx.save_for_backward(tanh)
        return tanh

    @staticmethod
    def backward(ctx, grad: Tensor):
        (tanh,) = ctx.saved_tensors
        return grad * (1 - tanh * tanh)


def rounding_only_what_must_be(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The reference in fp32 on inputs of a dtype, with probabilities and output rounded to it; in bf16 tanh as well."""
    logits = q.float() @ k.float().transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + bias.float()
    if softcap is not None:
        tanh = HardwareTanh.apply if q.dtype == torch.bfloat16 else torch.tanh
        logits = softcap * tanh(logits / softcap)
    if key_mask is None:
        weights = torch.softmax(logits, -1)
    else:
        hidden = ~key_mask[:, None, None, :]
        logits = logits.masked_fill(hidden & key_mask.any(-1)[:, None, None, None], -torch.inf)
        weights = torch.softmax(logits, -1).masked_fill(hidden, 0)
    return (Rounded.apply(weights, q.dtype) @ v.float()).to(q.dtype)
