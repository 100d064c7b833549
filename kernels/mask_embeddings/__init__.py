"""Zero hidden patch embeddings in every view, add prefix tokens and positions, in one pass over memory."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _backend
from . import reference

OP = "mask_embeddings"


def mask_embeddings(x: Tensor, visible: Tensor, position: Tensor, backend: str = "auto") -> Tensor:
    """Zero the hidden patches of every view, put empty prefix tokens in front, and add position embeddings.

    x [B, N, C], visible [B, V, N] bool, position [P + N, C]  ->  [B, V, P + N, C], in x's dtype.
    Locality Alignment, section 3.2 (m(g(x))) and appendix C (prefix tokens are masked at the decoder's input).

    Differentiable in x (summed over the views where a patch is visible) and in position (summed over B and V). Hidden
    embeddings are selected away, not multiplied: a NaN there reaches neither output nor gradients.
    Raises ValueError for shapes and dtypes that do not fit, BackendError for a named backend that cannot run.
    """
    _check(x, visible, position)
    dtype = torch.float64 if torch.float64 in (x.dtype, position.dtype) else x.dtype
    chosen = _backend.choose(OP, x.device, dtype, backend)
    if chosen == "reference":
        return reference.mask_embeddings(x, visible, position)
    return torch.ops.locfast.mask_embeddings(x, visible, position, chosen)


def _check(x: Tensor, visible: Tensor, position: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"mask_embeddings: x must be [B, N, C], got {list(x.shape)}")
    batch, patches, width = x.shape
    if visible.ndim != 3 or visible.shape[0] != batch or visible.shape[2] != patches:
        raise ValueError(
            f"mask_embeddings: visible must be [B, V, N] = [{batch}, V, {patches}] for x {list(x.shape)}, "
            f"got {list(visible.shape)}"
        )
    if visible.dtype != torch.bool:
        raise ValueError(f"mask_embeddings: visible must be bool (True = kept), got {visible.dtype}")
    if position.ndim != 2 or position.shape[1] != width or position.shape[0] < patches:
        raise ValueError(
            f"mask_embeddings: position must be [P + N, C] = [{patches} or more, {width}] for x {list(x.shape)}, "
            f"got {list(position.shape)}"
        )
    if not (x.is_floating_point() and position.is_floating_point()):
        raise ValueError(f"mask_embeddings: x and position must be floating point, got {x.dtype} and {position.dtype}")
    if not (x.device == visible.device == position.device):
        raise ValueError(
            f"mask_embeddings: x, visible and position must be on one device, got {x.device}, {visible.device} "
            f"and {position.device}"
        )


def _implementation(backend: str) -> ModuleType:
    """The module of a backend; Triton is imported only when it is wanted."""
    return reference if backend == "reference" else importlib.import_module(f".{backend}", __name__)


def _forward(x: Tensor, visible: Tensor, position: Tensor, backend: str) -> Tensor:
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever holds the tensors
        return _implementation(backend).mask_embeddings(x, visible, position)


def _backward(
    grad: Tensor, visible: Tensor, num_prefix_tokens: int, position_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(grad):
        x_grad, position_grad = _implementation(backend).mask_embeddings_backward(grad, visible, num_prefix_tokens)
    return x_grad, position_grad.to(position_dtype)


forward_op = torch.library.custom_op("locfast::mask_embeddings", _forward, mutates_args=())
backward_op = torch.library.custom_op("locfast::mask_embeddings_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(x: Tensor, visible: Tensor, position: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], visible.shape[1], *position.shape)


@backward_op.register_fake
def _(
    grad: Tensor, visible: Tensor, num_prefix_tokens: int, position_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    batch, _, patches = visible.shape
    tokens, width = grad.shape[2:]
    return grad.new_empty(batch, patches, width), grad.new_empty(tokens, width, dtype=position_dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    x, visible, position, ctx.backend = inputs
    ctx.save_for_backward(visible)
    ctx.num_prefix_tokens = position.shape[0] - x.shape[1]
    ctx.position_dtype = position.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (visible,) = ctx.saved_tensors
    x_grad, position_grad = torch.ops.locfast.mask_embeddings_backward(
        grad, visible, ctx.num_prefix_tokens, ctx.position_dtype, ctx.backend
    )
    return x_grad, None, position_grad, None


forward_op.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula([torch.ops.locfast.mask_embeddings, torch.ops.locfast.mask_embeddings_backward])
def _flops(*args: Any, **kwargs: Any) -> int:
    """None by the usual count, which takes matrix products alone."""
    return 0


_backend.register(OP, {"triton": _backend.triton_probe, "cuda": _backend.cuda_probe, "reference": _backend.anywhere})

__all__ = ["mask_embeddings"]
