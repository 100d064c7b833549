"""Attention whose logits are squashed into (-softcap, softcap) by a tanh before the softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .. import _backend
from . import reference, tiled

OP = "softcap_attention"


def softcap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    scale: float | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(softcap * tanh(q k^T * scale / softcap) + bias) v.

    q, k, v [B, H, T, D] of one dtype  ->  [B, H, T, D] in that dtype. softcap: in units of the logits, > 0; None for
    plain attention (through F.scaled_dot_product_attention). scale: default D^-0.5. bias: broadcastable to
    [B, H, T, T], added after the cap; -inf hides a token.

    Differentiable in q, k, v and bias; the reference backend twice. Under autocast q, k and v are cast as PyTorch's
    own attention casts them. The cap is the public MaskEmbed code's (Locality Alignment, student encoder, cap 30).
    Raises ValueError for shapes and dtypes that do not fit, BackendError for a named backend that cannot run.
    """
    _check(q, k, v, softcap, bias)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = _backend.choose(OP, q.device, q.dtype, backend)
    if chosen == "reference":
        return reference.softcap_attention(q, k, v, softcap, scale, bias)
    if bias is not None:
        bias = bias.reshape(*(1,) * (4 - bias.ndim), *bias.shape)
    if softcap is None:
        mask = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.ops.locfast.softcap_attention(q, k, v, softcap, scale, bias)


def _check(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, bias: Tensor | None) -> None:
    if q.ndim != 4 or not (q.shape == k.shape == v.shape):
        raise ValueError(
            f"softcap_attention: q, k and v must share one shape [B, H, T, D], got {list(q.shape)}, {list(k.shape)} "
            f"and {list(v.shape)}"
        )
    autocast = torch.is_autocast_enabled(q.device.type)
    if not q.is_floating_point() or not (autocast or q.dtype == k.dtype == v.dtype):
        raise ValueError(
            f"softcap_attention: q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if softcap is not None and not 0 < softcap < math.inf:  # inf * tanh(x / inf) is inf * 0
        raise ValueError(f"softcap_attention: softcap must be positive and finite, or None, got {softcap}")
    if bias is None:
        return
    batch, heads, tokens, _ = q.shape
    full = (batch, heads, tokens, tokens)
    fits = bias.ndim <= 4 and all(
        have in (1, want) for have, want in zip(reversed(bias.shape), reversed(full), strict=False)
    )
    if not fits or not bias.is_floating_point():
        raise ValueError(
            f"softcap_attention: bias must be floating and broadcastable to [B, H, T, T] = {list(full)}, "
            f"got {bias.dtype} {list(bias.shape)}"
        )


def _forward(q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float, bias: Tensor | None) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return tiled.softcap_attention(q, k, v, softcap, scale, bias)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float,
    scale: float,
    bias: Tensor | None,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        *grads, bias_grad = tiled.softcap_attention_backward(grad, q, k, v, softcap, scale, bias, needs_bias_grad)
    # An op's schema has no optional results: a gradient that nobody wants is an empty tensor.
    return grads[0], grads[1], grads[2], q.new_zeros(0) if bias_grad is None else bias_grad


forward_op = torch.library.custom_op("locfast::softcap_attention", _forward, mutates_args=())
backward_op = torch.library.custom_op("locfast::softcap_attention_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float, bias: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


@backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float,
    scale: float,
    bias: Tensor | None,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_grad = q.new_empty(0) if bias is None or not needs_bias_grad else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias_grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.softcap, ctx.scale, bias = inputs
    ctx.save_for_backward(q, k, v, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias = ctx.saved_tensors
    needs_bias_grad = ctx.needs_input_grad[5]
    q_grad, k_grad, v_grad, bias_grad = torch.ops.locfast.softcap_attention_backward(
        grad, q, k, v, ctx.softcap, ctx.scale, bias, needs_bias_grad
    )
    return q_grad, k_grad, v_grad, None, None, bias_grad if needs_bias_grad else None


forward_op.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.locfast.softcap_attention)
def _forward_flops(q_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Two products of T x T x D for every head, two FLOPs a multiply-add."""
    batch, heads, tokens, head_dim = q_shape
    return 4 * batch * heads * tokens * tokens * head_dim


@register_flop_formula(torch.ops.locfast.softcap_attention_backward)
def _backward_flops(grad_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Five such products: the scores once more, and those of the gradients of v, weights, q and k."""
    return _forward_flops(grad_shape) * 5 // 2


_backend.register(
    OP,
    {
        "triton": _backend.absent,
        "cuda": _backend.absent,
        "tiled": _backend.anywhere,
        "reference": _backend.anywhere,
    },
)

__all__ = ["softcap_attention"]
