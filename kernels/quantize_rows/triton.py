"""quantize_rows in Triton. Bound by memory: a row is read once, its codes and its scale are written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._variants import Variant, variant_of_launch
from .reference import LARGEST, PER_LARGEST, SMALLEST

MAX_TILE = 4096
"""Numbers that a program holds: 32 a thread in 4 warps; wider rows have a program to themselves, with more warps."""


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [M, K]
    codes_ptr,  # [M, K] uint8, the bits of e4m3
    scale_ptr,  # [M] fp32
    M,
    K,
    LARGEST: tl.constexpr,
    PER_LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    inside = (row < M)[:, None] & (column < K)[None, :]
    place = row[:, None] * K + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    # Magnitudes are ordered as their bits are, NaN above infinity: the maximum of integers loses no NaN.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = bits.to(tl.float32, bitcast=True)
    largest = tl.where(largest < SMALLEST, SMALLEST, largest)
    inverse = tl.div_rn(tl.full((BLOCK_M,), LARGEST, tl.float32), largest)
    codes = (x * inverse[:, None]).to(tl.float8e4nv)
    tl.store(codes_ptr + place, codes.to(tl.uint8, bitcast=True), mask=inside)
    tl.store(scale_ptr + row, largest * PER_LARGEST, mask=row < M)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] in fp32, bf16 or fp16  ->  codes [..., K] in e4m3, scales [..., 1] in fp32."""
    x = x.contiguous()
    width = x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    rows = scale.numel()
    if x.numel():
        constants, num_warps = _launch(width)
        grid = (triton.cdiv(rows, constants["BLOCK_M"]),)
        _quantize_rows_kernel[grid](x, codes, scale, rows, width, **constants, num_warps=num_warps)
    return codes.view(torch.float8_e4m3fn), scale


def _launch(width: int) -> tuple[dict[str, float], int]:
    """Constants of the kernel and its warps, for rows of `width`."""
    block = triton.next_power_of_2(width)
    rows = max(1, MAX_TILE // block)
    numbers = {"LARGEST": LARGEST, "PER_LARGEST": PER_LARGEST, "SMALLEST": SMALLEST}
    return {**numbers, "BLOCK_M": rows, "BLOCK_K": block}, max(4, min(16, block // 1024))


WIDTHS = (768, 3072, 1024, 4096, 1152, 4304)
"""Of what enters the linear layers of ViT-B, ViT-L and SO400M."""


def variants() -> list[Variant]:
    """What a norm gives under autocast, fp32, and what an activation or attention gives, bf16; at every width."""
    forms = [("fp32", width) for width in WIDTHS[::2]] + [("bf16", width) for width in WIDTHS]
    return [_variant(dtype, width) for dtype, width in forms]


def _variant(dtype: str, width: int) -> Variant:
    types = {"x_ptr": f"*{dtype}", "codes_ptr": "*u8", "scale_ptr": "*fp32"}
    constants, num_warps = _launch(width)
    return variant_of_launch(
        f"quantize_rows {dtype} K {width}",
        _quantize_rows_kernel,
        types,
        {"M": 64 * 3 * 577, "K": width},
        constants,
        dtype=dtype,
        num_warps=num_warps,
        architectures=(89, 1000),  # where e4m3 is
    )
