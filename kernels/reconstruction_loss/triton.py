"""reconstruction_loss in Triton. Bound by memory: prediction and target cross the bus once each way.

A program owns a few tokens, as a rule one for each warp, so a token's sum needs no shared memory. The loop over the
width is unrolled: all of a token's loads are in flight at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._variants import Variant, variant_of_launch
from .layout import merged
from .tiles import TRITON

EPS = tl.constexpr(1e-8)
"""Least norm of a cosine, as in torch.nn.functional.cosine_similarity."""
MAX_UNROLL = 8


@triton.jit
def _place(rows, V, T, TOKENS: tl.constexpr):
    """The program's tokens: their number in order, their image, view and place in it, and which of them exist."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    view = row // T
    return row.to(tl.int64), (view // V).to(tl.int64), (view % V).to(tl.int64), (row % T).to(tl.int64), row < rows


@triton.jit
def _load(prediction_ptr, target_ptr, scale, start, valid, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A step of the width in fp32: prediction, target times scale, zero beyond the width; channels, which exist."""
    channel = start + tl.arange(0, BLOCK_C)
    inside = valid[:, None] & (channel < C)[None, :]
    prediction = tl.load(prediction_ptr[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    target = tl.load(target_ptr[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32) * scale
    if C % BLOCK_C != 0:  # or a scale of infinity would make NaN of the padding
        target = tl.where((channel < C)[None, :], target, 0.0)
    return prediction, target, channel, inside


@triton.jit
def _forward_kernel(
    prediction_ptr,  # [B, V, T, C]
    target_ptr,  # [B, V, T, C]
    scale_ptr,  # [1] fp32
    distance_ptr,  # [rows] fp32
    slopes_ptr,  # [2, rows] fp32, for cosine
    rows,
    V,
    T,
    prediction_b,
    prediction_v,
    prediction_t,
    target_b,
    target_v,
    target_t,
    C: tl.constexpr,
    LOSS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row, b, v, t, valid = _place(rows, V, T, TOKENS)
    prediction_row = prediction_ptr + b * prediction_b + v * prediction_v + t * prediction_t
    target_row = target_ptr + b * target_b + v * target_v + t * target_t
    scale = tl.load(scale_ptr)
    total = tl.zeros((TOKENS, BLOCK_C), tl.float32)  # of distances; for cosine of products
    squares = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    target_squares = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C * UNROLL):
        for step in tl.static_range(UNROLL):
            p, y, _, _ = _load(prediction_row, target_row, scale, start + step * BLOCK_C, valid, C, BLOCK_C)
            if LOSS == "mse":
                total += (p - y) * (p - y)
            elif LOSS == "l1":
                total += tl.abs(p - y)
            else:
                total += p * y
                squares += p * p
                target_squares += y * y
    total = tl.sum(total, 1)
    if LOSS == "cosine":
        squares = tl.sum(squares, 1)
        norm = tl.sqrt_rn(squares)
        target_norm = tl.sqrt_rn(tl.sum(target_squares, 1))
        least = tl.where(norm < EPS, EPS, norm)  # and a NaN stays one
        slope = tl.div_rn(1.0, least * tl.where(target_norm < EPS, EPS, target_norm))
        # PyTorch's backward divides by the norm as it is, and takes no step where that is 0. The square of a rounded
        # root would cost a prediction near its target the last bits of a small gradient.
        share = tl.div_rn(total, tl.where(norm < EPS, least * norm, squares))
        tl.store(slopes_ptr + row, slope, mask=valid)
        tl.store(slopes_ptr + rows + row, tl.where(norm == 0.0, 0.0, share), mask=valid)
        distance = 1.0 - total * slope
    else:
        distance = tl.div_rn(total, C * 1.0)
    tl.store(distance_ptr + row, distance, mask=valid)


@triton.jit
def _backward_kernel(
    grad_ptr,  # [B, V, T] fp32
    prediction_ptr,  # [B, V, T, C]
    target_ptr,  # [B, V, T, C]
    scale_ptr,  # [1] fp32
    slopes_ptr,  # [2, rows] fp32, for cosine
    prediction_grad_ptr,  # [rows, C]
    rows,
    V,
    T,
    prediction_b,
    prediction_v,
    prediction_t,
    target_b,
    target_v,
    target_t,
    grad_b,
    grad_v,
    grad_t,
    C: tl.constexpr,
    LOSS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row, b, v, t, valid = _place(rows, V, T, TOKENS)
    prediction_row = prediction_ptr + b * prediction_b + v * prediction_v + t * prediction_t
    target_row = target_ptr + b * target_b + v * target_v + t * target_t
    scale = tl.load(scale_ptr)
    grad = tl.load(grad_ptr + b * grad_b + v * grad_v + t * grad_t, mask=valid, other=0.0)
    if LOSS == "cosine":
        slope = (grad * tl.load(slopes_ptr + row, mask=valid, other=0.0))[:, None]
        share = tl.load(slopes_ptr + rows + row, mask=valid, other=0.0)[:, None]
    else:
        slope = tl.div_rn(grad, C * 1.0)[:, None]
    for start in range(0, C, BLOCK_C * UNROLL):
        for step in tl.static_range(UNROLL):
            p, y, channel, inside = _load(prediction_row, target_row, scale, start + step * BLOCK_C, valid, C, BLOCK_C)
            if LOSS == "mse":
                result = slope * (2.0 * (p - y))
            elif LOSS == "l1":
                result = slope * tl.where(p > y, 1.0, tl.where(p < y, -1.0, 0.0))  # of a NaN 0, as in PyTorch
            else:
                result = slope * (share * p - y)
            place = prediction_grad_ptr + row[:, None] * C + channel[None, :]
            tl.store(place, result.to(prediction_grad_ptr.dtype.element_ty), mask=inside)


def _cut(kernel: str, width: int) -> dict[str, int]:
    tiles = TRITON[kernel]
    channels = min(tiles.channels, triton.next_power_of_2(width))
    unroll = min(MAX_UNROLL, triton.cdiv(width, channels))
    return {"TOKENS": tiles.tokens, "BLOCK_C": channels, "UNROLL": unroll}


def token_distance(prediction: Tensor, target: Tensor, scale: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """prediction and target [B, V, T, C], scale one number  ->  distances [B, V, T], slopes for the backward."""
    tokens, width = prediction.shape[:3], prediction.shape[3]
    distance = torch.empty(tokens, dtype=torch.float32, device=prediction.device)
    slopes = torch.empty((2, *tokens) if loss == "cosine" else (0,), dtype=torch.float32, device=prediction.device)
    if distance.numel() == 0:
        return distance, slopes
    prediction, target = merged(prediction, target)
    cut = _cut("forward", width)
    _forward_kernel[(triton.cdiv(distance.numel(), cut["TOKENS"]),)](
        prediction,
        target,
        scale.to(torch.float32),
        distance,
        slopes,
        distance.numel(),
        *prediction.shape[1:3],
        *prediction.stride()[:3],
        *target.stride()[:3],
        C=width,
        LOSS=loss,
        **cut,
        num_warps=TRITON["forward"].num_warps,
    )
    return distance, slopes


def token_distance_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, scale: Tensor, slopes: Tensor, loss: str
) -> Tensor:
    """grad [B, V, T] fp32, the forward's inputs and slopes  ->  gradient of prediction [B, V, T, C], contiguous."""
    result = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    if result.numel() == 0:
        return result
    prediction, target, grad = merged(prediction, target, grad[..., None])
    rows, width, cut = result[..., 0].numel(), result.shape[3], _cut("backward", result.shape[3])
    _backward_kernel[(triton.cdiv(rows, cut["TOKENS"]),)](
        grad,
        prediction,
        target,
        scale.to(torch.float32),
        slopes,
        result,
        rows,
        *prediction.shape[1:3],
        *prediction.stride()[:3],
        *target.stride()[:3],
        *grad.stride()[:3],
        C=width,
        LOSS=loss,
        **cut,
        num_warps=TRITON["backward"].num_warps,
    )
    return result


WIDTHS = {"B/16": 768, "L/14": 1024, "SO400M/14": 1152}
"""Of the published recipes: three views of each image, all tokens."""


def variants() -> list[Variant]:
    """Both kernels at each width and loss, as autocast calls them (a bf16 prediction of an fp32 target), and fp32."""
    forms = [("bf16", "fp32", loss, "B/16") for loss in ("mse", "l1", "cosine")]
    forms += [("bf16", "fp32", "mse", name) for name in ("L/14", "SO400M/14")]
    forms += [("bf16", "bf16", "mse", "B/16"), ("fp16", "fp32", "mse", "B/16"), ("fp32", "fp32", "mse", "B/16")]
    return [_variant(kernel, *form) for form in forms for kernel in ("forward", "backward")]


def _variant(kernel: str, dtype: str, target: str, loss: str, name: str) -> Variant:
    width = WIDTHS[name]
    types = {"prediction_ptr": f"*{dtype}", "target_ptr": f"*{target}", "scale_ptr": "*fp32", "slopes_ptr": "*fp32"}
    integers = {"rows": 64 * 3 * 197, "V": 1, "T": 1}
    walks = ("prediction", "target") if kernel == "forward" else ("prediction", "target", "grad")
    for walk in walks:
        step = 1 if walk == "grad" else width
        integers |= {f"{walk}_b": step, f"{walk}_v": 0, f"{walk}_t": 0}
    types |= {"distance_ptr": "*fp32"} if kernel == "forward" else {"grad_ptr": "*fp32"}
    types |= {} if kernel == "forward" else {"prediction_grad_ptr": f"*{dtype}"}
    function = _forward_kernel if kernel == "forward" else _backward_kernel
    label = f"reconstruction_loss {kernel} {loss} {dtype} of {target} {name}"
    constants = {"C": width, "LOSS": loss} | _cut(kernel, width)
    warps = TRITON[kernel].num_warps
    return variant_of_launch(label, function, types, integers, constants, num_warps=warps, dtype=dtype)
