"""How far a reconstruction is from its target, token by token, without writing the difference: MaskEmbed's loss."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _backend
from . import reference

OP = "reconstruction_loss"
LOSSES = ("mse", "l1", "cosine")
LOSS_ON = ("all", "hidden", "visible")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_TOKENS = 2**30
"""B * V * T, which kernels count in 32 bits; offsets of elements have 64."""


def reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    scale: Tensor,
    visible: Tensor | None = None,
    *,
    loss: str = "mse",
    loss_on: str = "all",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The distance of a reconstruction from a target times a scale: its mean, and what it is for every token.

    prediction and target [B, V, T, C], scale [] (one number), visible [B, V, N] bool (None for loss_on "all")
      ->  the loss, a scalar, and the distances [B, V, T], both in fp32 (fp64 for fp64 inputs).
    loss: mse, l1 (means over the width) or cosine (one minus the cosine, norms at least 1e-8).
    loss_on: all tokens, or only the hidden or only the visible of the last N. Then the mean is over an image's chosen
    patches first (0 where it has none), so that gradient accumulation and ranks do not change the loss.
    Locality Alignment, equation 1 and the ablations of table 4.

    Differentiable in the prediction alone, whose gradient has its dtype. Both inputs are read once each way.
    Raises ValueError for shapes, dtypes and names that do not fit and for a target or scale that requires a gradient,
    BackendError for a named backend that cannot run.
    """
    if loss_on not in LOSS_ON:
        raise ValueError(f"reconstruction_loss: loss_on must be one of {', '.join(LOSS_ON)}, got {loss_on!r}")
    per_token = token_distance(prediction, target, scale, loss=loss, backend=backend)
    return _mean(per_token, visible, loss_on), per_token


def token_distance(
    prediction: Tensor, target: Tensor, scale: Tensor, *, loss: str = "mse", backend: str = "auto"
) -> Tensor:
    """The distances [B, V, T] of `reconstruction_loss` alone; shapes, gradient and errors as there."""
    _check(prediction, target, scale, loss)
    dtype = torch.float64 if torch.float64 in (prediction.dtype, target.dtype) else prediction.dtype
    chosen = _backend.choose(OP, prediction.device, dtype, backend)
    if chosen == "reference":
        return reference.token_distance(prediction, target, scale, loss)
    return torch.ops.locfast.reconstruction_loss(prediction, target, scale, loss, chosen)[0]


def _mean(per_token: Tensor, visible: Tensor | None, loss_on: str) -> Tensor:
    if loss_on == "all":
        return per_token.mean()
    if visible is None or visible.dtype != torch.bool or visible.shape[:2] != per_token.shape[:2] or visible.ndim != 3:
        found = None if visible is None else f"{visible.dtype} {list(visible.shape)}"
        wanted = f"bool [{per_token.shape[0]}, {per_token.shape[1]}, N]"
        raise ValueError(f"reconstruction_loss: loss_on {loss_on} needs visible, {wanted}, got {found}")
    num_prefix_tokens = per_token.shape[2] - visible.shape[2]
    if num_prefix_tokens < 0:
        raise ValueError(
            f"reconstruction_loss: visible has {visible.shape[2]} patches, more than the {per_token.shape[2]} tokens"
        )
    chosen = (visible if loss_on == "visible" else ~visible).flatten(1)
    patches = per_token[:, :, num_prefix_tokens:].flatten(1)
    return (torch.where(chosen, patches, 0).sum(1) / chosen.sum(1).clamp(min=1)).mean()


def _check(prediction: Tensor, target: Tensor, scale: Tensor, loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"reconstruction_loss: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if prediction.ndim != 4 or prediction.shape != target.shape:
        raise ValueError(
            f"reconstruction_loss: prediction and target must be [B, V, T, C] both, got {list(prediction.shape)} "
            f"and {list(target.shape)}"
        )
    if prediction.shape[3] == 0:
        raise ValueError(f"reconstruction_loss: a width of 0 has no mean, got {list(prediction.shape)}")
    if scale.numel() != 1:
        raise ValueError(f"reconstruction_loss: scale must be one number, got {list(scale.shape)}")
    for name, tensor in (("prediction", prediction), ("target", target), ("scale", scale)):
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"reconstruction_loss: {name} must be fp64, fp32, fp16 or bf16 (floating point), got {tensor.dtype}"
            )
    if not (prediction.device == target.device == scale.device):
        raise ValueError(
            f"reconstruction_loss: prediction, target and scale must be on one device, got {prediction.device}, "
            f"{target.device} and {scale.device}"
        )
    for name, tensor in (("target", target), ("scale", scale)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"reconstruction_loss: {name} requires a gradient, and only the prediction gets one; "
                f"pass {name}.detach()"
            )
    if prediction.shape[:3].numel() > MAX_TOKENS:
        raise ValueError(f"reconstruction_loss: at most 2^30 tokens at once, got {prediction.shape[:3].numel()}")


def _implementation(backend: str) -> ModuleType:
    """The module of a fused backend; Triton is imported only when it is wanted."""
    return importlib.import_module(f".{backend}", __name__)


def _forward(prediction: Tensor, target: Tensor, scale: Tensor, loss: str, backend: str) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(prediction):  # Triton launches on the current device, whichever holds the tensors
        return _implementation(backend).token_distance(prediction, target, scale, loss)


def _backward(
    grad: Tensor, prediction: Tensor, target: Tensor, scale: Tensor, slopes: Tensor, loss: str, backend: str
) -> Tensor:
    with torch.cuda.device_of(prediction):
        return _implementation(backend).token_distance_backward(grad, prediction, target, scale, slopes, loss)


forward_op = torch.library.custom_op("locfast::reconstruction_loss", _forward, mutates_args=())
backward_op = torch.library.custom_op("locfast::reconstruction_loss_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(prediction: Tensor, target: Tensor, scale: Tensor, loss: str, backend: str) -> tuple[Tensor, Tensor]:
    tokens = prediction.shape[:3]
    slopes = (2, *tokens) if loss == "cosine" else (0,)
    return prediction.new_empty(tokens, dtype=torch.float32), prediction.new_empty(slopes, dtype=torch.float32)


@backward_op.register_fake
def _(
    grad: Tensor, prediction: Tensor, target: Tensor, scale: Tensor, slopes: Tensor, loss: str, backend: str
) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str, str], output: tuple[Tensor, Tensor]) -> None:
    prediction, target, scale, ctx.loss, ctx.backend = inputs
    ctx.save_for_backward(prediction, target, scale, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    saved = ctx.saved_tensors
    return torch.ops.locfast.reconstruction_loss_backward(grad, *saved, ctx.loss, ctx.backend), None, None, None, None


forward_op.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula([torch.ops.locfast.reconstruction_loss, torch.ops.locfast.reconstruction_loss_backward])
def _flops(*args: Any, **kwargs: Any) -> int:
    """None by the usual count, which takes matrix products alone."""
    return 0


_backend.register(OP, {"triton": _backend.triton_probe, "cuda": _backend.cuda_probe, "reference": _backend.anywhere})

__all__ = ["reconstruction_loss", "token_distance"]
