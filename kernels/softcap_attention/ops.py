"""The registered operators: what eager PyTorch, autograd, torch.compile and FLOP counters see of a backend."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _backend
from . import cuda, tiled
from .layout import heads_inside_tokens


def _fused(backend: str) -> ModuleType:
    """The module of a fused backend; Triton is imported, and the compiled library loaded, only when it is wanted."""
    if backend == "cuda":
        _backend.library_failure()  # loads it: a graph that was saved calls the op without choosing a backend
        return cuda
    return importlib.import_module(".triton", __package__)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    scale: float,
    key_mask: Tensor | None,
    bias: Tensor | None,
    keeps_rest: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and what rounding the output lost: that for backend triton alone, where it is to be kept."""
    if backend == "tiled":
        with torch.autocast(q.device.type, enabled=False):
            out = tiled.softcap_attention(q, k, v, softcap, scale, key_mask, bias)
        return out, q.new_empty(0, dtype=torch.float32), q.new_empty(0)
    q, k, v = (_with_unit_stride(t) for t in (q, k, v))
    with torch.cuda.device_of(q):  # Triton launches on the current device, whichever holds the tensors
        return _fused(backend).softcap_attention(q, k, v, softcap, scale, key_mask, keeps_rest)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    softcap: float | None,
    scale: float,
    key_mask: Tensor | None,
    bias: Tensor | None,
    needs_bias_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "tiled":
        with torch.autocast(q.device.type, enabled=False):
            *grads, bias_grad = tiled.softcap_attention_backward(
                grad, q, k, v, softcap, scale, key_mask, bias, needs_bias_grad
            )
    else:
        grad, q, k, v = (_with_unit_stride(t) for t in (grad, q, k, v))
        out, lse = _as_the_forward_laid_it(out), lse.contiguous()
        rest = _as_the_forward_laid_it(rest) if rest.numel() else rest
        with torch.cuda.device_of(q):
            grads = _fused(backend).softcap_attention_backward(grad, q, k, v, out, lse, rest, softcap, scale, key_mask)
        bias_grad = None
    # An op's schema has no optional results: a gradient that nobody wants is an empty tensor.
    return grads[0], grads[1], grads[2], q.new_empty(0) if bias_grad is None else bias_grad


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _as_the_forward_laid_it(out: Tensor) -> Tensor:
    """What was saved may come back otherwise: torch.autograd.graph.save_on_cpu(pin_memory=True) makes it contiguous."""
    return out if out.transpose(1, 2).is_contiguous() else heads_inside_tokens(out).copy_(out)


forward_op = torch.library.custom_op("locfast::softcap_attention", _forward, mutates_args=())
backward_op = torch.library.custom_op("locfast::softcap_attention_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    scale: float,
    key_mask: Tensor | None,
    bias: Tensor | None,
    keeps_rest: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "tiled":
        return heads_inside_tokens(q), q.new_empty(0, dtype=torch.float32), q.new_empty(0)
    precise = torch.float64 if q.dtype == torch.float32 else torch.float32
    rest = heads_inside_tokens(q) if keeps_rest and backend == "triton" else q.new_empty(0)
    return heads_inside_tokens(q), q.new_empty(q.shape[:3], dtype=precise), rest


@backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    softcap: float | None,
    scale: float,
    key_mask: Tensor | None,
    bias: Tensor | None,
    needs_bias_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_grad = q.new_empty(0) if bias is None or not needs_bias_grad else bias.new_empty(bias.shape)
    return heads_inside_tokens(q), heads_inside_tokens(k), heads_inside_tokens(v), bias_grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, ctx.softcap, ctx.scale, key_mask, bias, _, ctx.backend = inputs
    out, lse, rest = output
    ctx.mark_non_differentiable(lse, rest)
    ctx.set_materialize_grads(False)  # or every backward would fill gradients of lse and rest with zeros first
    ctx.save_for_backward(q, k, v, out, lse, rest, key_mask, bias)


def _differentiate(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    q, k, v, out, lse, rest, key_mask, bias = ctx.saved_tensors
    needs_bias_grad = ctx.needs_input_grad[6]
    q_grad, k_grad, v_grad, bias_grad = torch.ops.locfast.softcap_attention_backward(
        grad, q, k, v, out, lse, rest, ctx.softcap, ctx.scale, key_mask, bias, needs_bias_grad, ctx.backend
    )
    return q_grad, k_grad, v_grad, None, None, None, bias_grad if needs_bias_grad else None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("softcap_attention: for a gradient of a gradient use backend='reference'; the others have none")


forward_op.register_autograd(_differentiate, setup_context=_setup_context)
backward_op.register_autograd(_refuse)


@register_flop_formula(torch.ops.locfast.softcap_attention)
def _forward_flops(q_shape: torch.Size, k_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Two products of Tq x Tk x D for every head, two FLOPs a multiply-add."""
    batch, heads, queries, head_dim = q_shape
    return 4 * batch * heads * queries * k_shape[2] * head_dim


@register_flop_formula(torch.ops.locfast.softcap_attention_backward)
def _backward_flops(grad_shape: torch.Size, q_shape: torch.Size, k_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Five such products: the scores once more, and those of the gradients of v, weights, q and k."""
    return _forward_flops(q_shape, k_shape) * 5 // 2
