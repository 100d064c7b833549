"""Put masked views together from tokens that were computed once, in one pass over memory."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _backend
from . import reference

OP = "select_views"


def select_views(shown: Tensor, hidden: Tensor, visible: Tensor, backend: str = "auto") -> Tensor:
    """The tokens of every view: a visible patch's own row, for hidden patches and prefixes the row all images share.

    shown [B, N, C], hidden [P + N, C] in the same dtype, visible [B, V, N] bool  ->  [B, V, P + N, C], bit for bit.
    Locality Alignment, section 3.2: a hidden patch is a function of its place alone, and a visible one is the same in
    every view that shows it, so whatever is done to single tokens need not be done once a view.

    Differentiable in shown (summed over the views that show a patch) and in hidden (summed over images and views that
    hide it). Rows are selected, not multiplied: a NaN in a hidden patch reaches neither output nor gradients.
    Raises ValueError for shapes and dtypes that do not fit, BackendError for a named backend that cannot run.
    """
    _check(shown, hidden, visible)
    chosen = _backend.choose(OP, shown.device, shown.dtype, backend)
    if chosen == "reference":
        return reference.select_views(shown, hidden, visible)
    return torch.ops.locfast.select_views(shown, hidden, visible, chosen)


def _check(shown: Tensor, hidden: Tensor, visible: Tensor) -> None:
    if shown.ndim != 3 or not shown.is_floating_point():
        raise ValueError(f"select_views: shown must be floating point [B, N, C], got {shown.dtype} {list(shown.shape)}")
    batch, patches, width = shown.shape
    if visible.dtype != torch.bool or visible.ndim != 3 or (visible.shape[0], visible.shape[2]) != (batch, patches):
        raise ValueError(
            f"select_views: visible must be bool [B, V, N] = [{batch}, V, {patches}] for shown {list(shown.shape)}, "
            f"got {visible.dtype} {list(visible.shape)}"
        )
    if hidden.ndim != 2 or hidden.shape[1] != width or hidden.shape[0] < patches or hidden.dtype != shown.dtype:
        raise ValueError(
            f"select_views: hidden must be {shown.dtype} [P + N, C] = [{patches} or more, {width}] for shown "
            f"{list(shown.shape)}, got {hidden.dtype} {list(hidden.shape)}"
        )
    if not (shown.device == hidden.device == visible.device):
        raise ValueError(
            f"select_views: shown, hidden and visible must be on one device, got {shown.device}, {hidden.device} and "
            f"{visible.device}"
        )


def _implementation(backend: str) -> ModuleType:
    """The module of a backend; Triton is imported only when it is wanted."""
    return reference if backend == "reference" else importlib.import_module(f".{backend}", __name__)


def _forward(shown: Tensor, hidden: Tensor, visible: Tensor, backend: str) -> Tensor:
    with torch.cuda.device_of(shown):  # Triton launches on the current device, whichever holds the tensors
        return _implementation(backend).select_views(shown, hidden, visible)


def _backward(grad: Tensor, visible: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(grad):
        shown_grad, hidden_grad = _implementation(backend).select_views_backward(grad, visible)
    return shown_grad, hidden_grad.to(grad.dtype)


forward_op = torch.library.custom_op("locfast::select_views", _forward, mutates_args=())
backward_op = torch.library.custom_op("locfast::select_views_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(shown: Tensor, hidden: Tensor, visible: Tensor, backend: str) -> Tensor:
    return shown.new_empty(shown.shape[0], visible.shape[1], *hidden.shape)


@backward_op.register_fake
def _(grad: Tensor, visible: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return grad.new_empty(visible.shape[0], visible.shape[2], grad.shape[3]), grad.new_empty(grad.shape[2:])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    _, _, visible, ctx.backend = inputs
    ctx.save_for_backward(visible)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (visible,) = ctx.saved_tensors
    shown_grad, hidden_grad = torch.ops.locfast.select_views_backward(grad, visible, ctx.backend)
    return shown_grad, hidden_grad, None, None


forward_op.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula([torch.ops.locfast.select_views, torch.ops.locfast.select_views_backward])
def _flops(*args: Any, **kwargs: Any) -> int:
    """None by the usual count, which takes matrix products alone."""
    return 0


_backend.register(OP, {"triton": _backend.triton_probe, "cuda": _backend.cuda_probe, "reference": _backend.anywhere})

__all__ = ["select_views"]
