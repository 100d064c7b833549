"""Soft-capped flash attention in Triton: tiles, launches, and the list of compiled forms.

A program owns a block of rows and walks over the other side's tokens in full blocks, then over one smaller tail, so 577
tokens cost 592, not 640. Saved for the backward: out and the log-sum-exp. Deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from .._variants import Variant
from .layout import heads_inside_tokens
from .triton_backward_kv import _backward_kv_kernel
from .triton_backward_q import _backward_q_kernel
from .triton_forward import _forward_kernel
from .triton_tiles import Tiles, architecture, tiles, tiles_override

LOG2E = math.log2(math.e)
MAX_SHIFTED_CAP = 80.0
"""Caps up to here need no running maximum: exp(2 cap - 87), times 8192 keys, times values of 100, stays within fp32."""
MAX_HARDWARE_CAP = 40.0
"""bf16 caps up to here may take the hardware's tanh. It errs by up to 2^-11, and a logit by that times the cap: at 30
less than the kernel's other roundings do, at 50 nearly all that the tolerance has for all of them together."""
MAX_EXPONENTIAL_CAP = 256.0
"""16-bit caps up to here: an absolute error of 1.2e-7 in tanh is one of 3e-5 in a logit, an eighth of fp16's."""


def softcap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    scale: float,
    key_mask: Tensor | None,
    keeps_rest: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, Tq, D], k, v [B, H, Tk, D] of last stride 1  ->  out [B, H, Tq, D], log-sum-exp [B, H, Tq], rest.

    rest [B, H, Tq, D] is what rounding lost of out (times 2^11 in fp16), to the same number of bits; empty unless
    asked for. With it rows are divided by the sum of the rounded weights, without it by that of the weights: out may
    differ in its last bit.
    """
    batch, heads, queries, head_dim = q.shape
    out = heads_inside_tokens(q)
    lse = q.new_empty(batch, heads, queries, dtype=lse_dtype(q.dtype))
    rest = heads_inside_tokens(q) if keeps_rest else q.new_empty(0)
    if out.numel() == 0:
        return out, lse, rest
    cut = tiles("forward", head_dim, q.dtype, queries, architecture(q.device))
    shift = _shift(softcap, q.dtype)
    align = _alignment(q, k, v, out)
    constants = _constants(cut, head_dim, q.dtype, queries, k.shape[2], softcap, key_mask is not None)
    _forward_kernel[(batch * heads * triton.cdiv(queries, cut.own),)](
        q,
        k,
        v,
        _bytes(key_mask, lse),
        out,
        rest if keeps_rest else out,
        lse,
        *_strides(align, q, k, v, out),
        heads,
        queries,
        k.shape[2],
        *_scales(softcap, scale, q.dtype),
        0.0 if shift is None else shift * LOG2E,
        ONLINE=shift is None,
        HAS_REST=keeps_rest,
        ALIGN=align,
        **constants,
        **_options(cut),
    )
    return out, lse, rest


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
    """Gradients of q, k and v; out, lse and rest laid out as the forward's, grad [B, H, Tq, D] of last stride 1."""
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    q_grad, k_grad, v_grad = heads_inside_tokens(q), heads_inside_tokens(k), heads_inside_tokens(v)
    if q_grad.numel() == 0 or k_grad.numel() == 0:
        return q_grad.zero_(), k_grad.zero_(), v_grad.zero_()
    arch = architecture(q.device)
    pairs = torch.empty(lse.shape, dtype=torch.int64, device=lse.device)
    align = _alignment(grad, q, k, v, out, k_grad)
    # One key has weight 1 whatever its score: then q and k get no gradient, not even a rounding error.
    sizes = (heads, queries, keys, *_scales(softcap, scale, q.dtype), scale if keys > 1 else 0.0)
    mask = _bytes(key_mask, lse)

    cut = tiles("backward_q", head_dim, q.dtype, queries, arch)
    _backward_q_kernel[(batch * heads * triton.cdiv(queries, cut.own),)](
        *(grad, q, k, v, out, rest if rest.numel() else out, q_grad, lse, pairs, mask),
        *_strides(align, grad, q, k, v, out),
        *sizes,
        ALIGN=align,
        HAS_REST=rest.numel() > 0,
        **_constants(cut, head_dim, q.dtype, queries, keys, softcap, key_mask is not None),
        **_options(cut),
    )
    cut = tiles("backward_kv", head_dim, q.dtype, keys, arch)
    _backward_kv_kernel[(batch * heads * triton.cdiv(keys, cut.own),)](
        *(grad, q, k, v, k_grad, v_grad, lse, pairs, mask),
        *_strides(align, grad, q, k, v, k_grad),
        *sizes,
        ALIGN=align,
        **_constants(cut, head_dim, q.dtype, keys, queries, softcap, key_mask is not None),
        **_options(cut),
    )
    return q_grad, k_grad, v_grad


def _shift(softcap: float | None, dtype: torch.dtype) -> float | None:
    """The constant that stands for a row's highest logit in exp(s - shift); None where a running maximum is needed.

    Without one, weights reach from exp(-softcap - shift) to exp(softcap - shift), which fp16 cannot hold, and their sum
    may be so far from 1 that its logarithm has too few digits for an fp32 backward.
    """
    if softcap is None or softcap > MAX_SHIFTED_CAP or dtype != torch.bfloat16:
        return None
    return min(softcap, 87.0 - softcap)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the saved log-sum-exp: fp32 next to 80 is good to 4e-6, which the weights of fp32 inputs would show."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _scales(softcap: float | None, scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """What turns q k^T into the argument of tanh, and tanh into a logit: in powers of two, in fp32 of e."""
    log2e = 1.0 if dtype == torch.float32 else LOG2E
    return (scale * log2e, 1.0) if softcap is None else (scale / softcap, softcap * log2e)


def _constants(
    cut: Tiles, head_dim: int, dtype: torch.dtype, owned: int, walked: int, softcap: float | None, has_mask: bool
) -> dict[str, Any]:
    """Compile-time arguments of a kernel whose programs own blocks of `owned` tokens and walk over `walked` others."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    second = max(0, head_dim - first)
    if second:
        second = max(16, triton.next_power_of_2(second))
    if second >= first:
        first, second = 2 * first, 0
    return {
        "D": head_dim,
        "D0": first,
        "D1": second,
        "OWN": cut.own,
        "OWN_TAIL": _tail(owned, cut.own) % cut.own if cut.own_tail else 0,  # a last block of the same size is no other
        "WALK": cut.walk,
        "WALK_TAIL": _tail(walked, cut.walk),
        "TANH": _tanh(softcap, dtype),
        "HAS_MASK": has_mask,
        "PRECISION": "ieee",  # of products of fp32 tiles; 16-bit ones run on tensor cores either way
    }


def _tail(tokens: int, block: int) -> int:
    """Size of the last, smaller block; 0 where all are full."""
    rest = tokens % block
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def _tanh(softcap: float | None, dtype: torch.dtype) -> str:
    """Which of triton_parts's a kernel takes: the cheapest that the dtype's own rounding hides."""
    if softcap is None:
        return "none"
    if dtype == torch.bfloat16 and softcap <= MAX_HARDWARE_CAP:
        return "hardware"
    return "exponential" if dtype != torch.float32 and softcap <= MAX_EXPONENTIAL_CAP else "accurate"


def _options(cut: Tiles) -> dict[str, Any]:
    """Compile options; fusion of products and sums is said aloud since Triton means to change its default."""
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages, "enable_fp_fusion": True}
    return options if cut.max_registers is None else options | {"maxnreg": cut.max_registers}


def _strides(unit: int, *tensors: Tensor) -> list[int]:
    """Strides of batch, head and token of each, in units of so many elements.

    So the compiler knows that they count 16-byte pieces. Triton itself sees only multiples of 16 elements, which the
    head stride of a packed projection is not at head dim 72, and would load such heads two bytes at a time.
    """
    return [0 if t.shape[i] == 1 else t.stride(i) // unit for t in tensors for i in range(3)]


def _alignment(*tensors: Tensor) -> int:
    """Elements that divide all strides, at most 16 bytes' worth."""
    return math.gcd(16 // tensors[0].element_size(), *_strides(1, *tensors))


def _bytes(key_mask: Tensor | None, otherwise: Tensor) -> Tensor:
    """The mask as bytes; where there is none, any pointer, which is not read."""
    return otherwise if key_mask is None else key_mask.contiguous().view(torch.uint8)


def variants() -> list[Variant]:
    """The forms that ViTs use: every head dim at its usual length, in every dtype, before sm_90 and from there on."""
    lengths = {64: 577, 72: 729, 80: 257, 96: 577, 128: 577, 256: 577}
    return [
        _variant(name, kernel, dtype, head_dim, tokens, arch)
        for name, kernel in _KERNELS.items()
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for head_dim, tokens in lengths.items()
        for arch in (80, 90)
        if dtype != torch.float32 or head_dim in (64, 80, 128)
    ]


_KERNELS: dict[str, Callable[..., Any]] = {
    "forward": _forward_kernel,
    "forward_rest": _forward_kernel,  # where a backward is to come
    "backward_q": _backward_q_kernel,
    "backward_kv": _backward_kv_kernel,
}


def _variant(name: str, kernel: Any, dtype: torch.dtype, head_dim: int, tokens: int, arch: int) -> Variant:
    cut, softcap = tiles(name.removesuffix("_rest"), head_dim, dtype, tokens, arch), 30.0
    constants = _constants(cut, head_dim, dtype, tokens, tokens, softcap, False)
    constants["ALIGN"] = 16 // dtype.itemsize
    if kernel is _forward_kernel:
        constants["ONLINE"] = _shift(softcap, dtype) is None
    if name != "backward_kv":
        constants["HAS_REST"] = name != "forward" and dtype != torch.float32
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    options = _options(cut)
    types = {}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            types[argument] = f"*{short}"
        elif argument in ("scale", "cap", "shift", "logit_scale"):
            types[argument] = "fp32"
        elif argument not in constants:
            types[argument] = "i32"
    types |= {"mask_ptr": "*u8", "lse_ptr": "*fp64" if dtype == torch.float32 else "*fp32"}
    if "pair_ptr" in types:
        types["pair_ptr"] = "*i64"
    return Variant(
        name=f"softcap_attention {name} {short} D {head_dim}",
        kernel=kernel,
        types=types,
        constants=constants,
        unaligned=tuple(arg for arg, kind in types.items() if kind == "i32"),
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        options=options,
        dtype=short,
        head_dim=head_dim,
        architectures=(0, 89) if arch < 90 else (90, 119),
        needs_tensor_cores=dtype != torch.float32 and head_dim <= 128,
    )


__all__ = ["Tiles", "softcap_attention", "softcap_attention_backward", "tiles_override", "variants"]
