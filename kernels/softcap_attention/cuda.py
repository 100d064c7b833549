"""softcap_attention through locfast/_C.so: bf16 and fp16 on the tensor cores, and on the CPU by the same source."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend

SHARED_BYTES = 0
"""Shared memory that a block may take; 0: all that the device has. Less makes keys stream through it (for tests)."""
MAX_HEAD_DIM = 128
ROW_ALIGNMENT = 16
"""Rows are read in packs of this many bytes."""


def probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run on a device with a dtype; None where they can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it is for bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return _backend.cuda_probe(device, dtype)


def softcap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    scale: float,
    key_mask: Tensor | None,
    keeps_rest: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, Tq, D], k and v [B, H, Tk, D], key_mask [B, Tk]  ->  out [B, H, Tq, D], lse [B, H, Tq] fp32, nothing.

    The third is for the Triton kernels' rest of the rounding; these compute an exact delta instead, and keep none.
    """
    _check_head_dim(q)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    out, lse = torch.ops.locfast_C.softcap_attention(q, k, v, softcap, scale, key_mask, SHARED_BYTES)
    return out, lse, q.new_empty(0)


def softcap_attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, out [B, H, Tq, D], lse [B, H, Tq], rest unused  ->  gradients of q [B, H, Tq, D], k and v [B, H, Tk, D]."""
    grad, q, k, v, out = (_aligned(t) for t in (grad, q, k, v, out))
    q_grad, k_grad, v_grad = torch.ops.locfast_C.softcap_attention_backward(
        grad, q, k, v, out, lse.contiguous(), softcap, scale, key_mask, SHARED_BYTES
    )
    return q_grad, k_grad, v_grad


def _check_head_dim(q: Tensor) -> None:
    head_dim = q.shape[-1]
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"softcap_attention: backend cuda takes head dims that are multiples of 8 up to {MAX_HEAD_DIM}, got q "
            f"{list(q.shape)}. Use backend='triton' or 'tiled'."
        )


def _aligned(x: Tensor) -> Tensor:
    """x itself where its rows lie on 16-byte boundaries, as slices of a packed qkv do; else a contiguous copy."""
    fits = x.stride(-1) == 1 and x.data_ptr() % ROW_ALIGNMENT == 0
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        fits = fits and (size <= 1 or stride * x.element_size() % ROW_ALIGNMENT == 0)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
