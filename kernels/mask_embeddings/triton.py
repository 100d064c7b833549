"""mask_embeddings in Triton. Bound by memory: x, the gradient and the output cross the bus once.

A program owns a tile of tokens x channels and walks over images and views, so positions and the sums for their
gradient stay in registers. The backward uses no atomics: each program writes its own partial sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._variants import Variant, variant_of_launch

WANTED_PROGRAMS = 1024
"""Programs that keep a large GPU busy (132 multiprocessors, several programs on each); not tuned on one yet."""
BLOCK_TOKENS = 8
MAX_BLOCK_CHANNELS = 256


@triton.jit
def _mask_embeddings_kernel(
    x_ptr,  # [B, N, C]
    visible_ptr,  # [B, V, N] uint8
    position_ptr,  # [P + N, C]
    out_ptr,  # [B, V, P + N, C]
    B,
    V,
    N,
    P,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part, parts = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    patch = token - P
    is_patch = (patch >= 0) & (patch < N)
    inside = (token < P + N)[:, None] & (channel < C)[None, :]
    column = token[:, None] * C + channel[None, :]
    patch_column = patch[:, None] * C + channel[None, :]
    position = tl.load(position_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for image in range(part * B // parts, (part + 1) * B // parts):
        x = tl.load(x_ptr + image * N * C + patch_column, mask=inside & is_patch[:, None], other=0.0).to(tl.float32)
        for view in range(image * V, image * V + V):
            shown = tl.load(visible_ptr + view * N + patch, mask=is_patch, other=0) != 0
            # Selected, not multiplied: a NaN in a hidden patch must not leak.
            out = tl.where(shown[:, None], x, 0.0) + position
            tl.store(out_ptr + view * (P + N) * C + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mask_embeddings_backward_kernel(
    grad_ptr,  # [B, V, P + N, C]
    visible_ptr,  # [B, V, N] uint8
    x_grad_ptr,  # [B, N, C]
    partial_ptr,  # [parts, P + N, C] fp32
    B,
    V,
    N,
    P,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part, parts = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    patch = token - P
    is_patch = (patch >= 0) & (patch < N)
    inside = (token < P + N)[:, None] & (channel < C)[None, :]
    column = token[:, None] * C + channel[None, :]
    patch_column = patch[:, None] * C + channel[None, :]
    position_grad = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for image in range(part * B // parts, (part + 1) * B // parts):
        x_grad = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for view in range(image * V, image * V + V):
            shown = tl.load(visible_ptr + view * N + patch, mask=is_patch, other=0) != 0
            grad = tl.load(grad_ptr + view * (P + N) * C + column, mask=inside, other=0.0).to(tl.float32)
            position_grad += grad
            x_grad += tl.where(shown[:, None], grad, 0.0)
        tl.store(
            x_grad_ptr + image * N * C + patch_column,
            x_grad.to(x_grad_ptr.dtype.element_ty),
            mask=inside & is_patch[:, None],
        )
    tl.store(partial_ptr + part * (P + N) * C + column, position_grad, mask=inside)


def _grid(batch: int, tokens: int, width: int) -> tuple[tuple[int, int, int], int]:
    """Launch grid (token tiles, channel tiles, parts of the batch) and the channels of a tile.

    A function of the shape alone, so sums are cut the same way, and give the same bits, on every GPU.
    """
    block_channels = min(MAX_BLOCK_CHANNELS, triton.next_power_of_2(width))
    tiles = triton.cdiv(tokens, BLOCK_TOKENS), triton.cdiv(width, block_channels)
    return (*tiles, max(1, min(batch, triton.cdiv(WANTED_PROGRAMS, tiles[0] * tiles[1])))), block_channels


def mask_embeddings(x: Tensor, visible: Tensor, position: Tensor) -> Tensor:
    """x [B, N, C] fp32, fp16 or bf16, visible [B, V, N], position [P + N, C]  ->  [B, V, P + N, C]."""
    x, visible, position = x.contiguous(), visible.contiguous(), position.contiguous()
    batch, patches, width = x.shape
    views, tokens = visible.shape[1], position.shape[0]
    out = torch.empty(batch, views, tokens, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    grid, block_channels = _grid(batch, tokens, width)
    _mask_embeddings_kernel[grid](
        x,
        visible.view(torch.uint8),
        position,
        out,
        batch,
        views,
        patches,
        tokens - patches,
        width,
        BLOCK_T=BLOCK_TOKENS,
        BLOCK_C=block_channels,
    )
    return out


def mask_embeddings_backward(grad: Tensor, visible: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """grad [B, V, P + N, C]  ->  gradients of x [B, N, C] in grad's dtype, and of position [P + N, C] in fp32."""
    grad, visible = grad.contiguous(), visible.contiguous()
    batch, views, tokens, width = grad.shape
    patches = tokens - num_prefix_tokens
    grid, block_channels = _grid(batch, tokens, width)
    x_grad = torch.empty(batch, patches, width, dtype=grad.dtype, device=grad.device)
    partial = torch.empty(grid[2], tokens, width, dtype=torch.float32, device=grad.device)
    if grad.numel() == 0:
        return x_grad.zero_(), partial.new_zeros(tokens, width)
    _mask_embeddings_backward_kernel[grid](
        grad,
        visible.view(torch.uint8),
        x_grad,
        partial,
        batch,
        views,
        patches,
        num_prefix_tokens,
        width,
        BLOCK_T=BLOCK_TOKENS,
        BLOCK_C=block_channels,
    )
    return x_grad, partial.sum(0)


SHAPES = {"B/16@224": (196, 1, 768), "L/14@336": (576, 1, 1024), "SO400M/14@384": (729, 0, 1152)}
"""Patches, prefix tokens and decoder width of the published recipes: three views of each image."""


def variants() -> list[Variant]:
    """Both kernels, at the shapes of the recipes in bf16 and at the smallest of them in fp16 and fp32."""
    forms = [("bf16", shape) for shape in SHAPES] + [("fp16", "B/16@224"), ("fp32", "B/16@224")]
    return [variant for dtype, shape in forms for variant in _variants_of(dtype, shape)]


def _variants_of(dtype: str, shape: str) -> list[Variant]:
    patches, prefix, width = SHAPES[shape]
    integers = {"B": 64, "V": 3, "N": patches, "P": prefix, "C": width}
    blocks = {"BLOCK_T": BLOCK_TOKENS, "BLOCK_C": _grid(64, patches + prefix, width)[1]}
    visible, data = {"visible_ptr": "*u8"}, f"*{dtype}"
    forward = {"x_ptr": data, "position_ptr": "*fp32", "out_ptr": data} | visible
    backward = {"grad_ptr": data, "x_grad_ptr": data, "partial_ptr": "*fp32"} | visible
    return [
        variant_of_launch(f"mask_embeddings {name} {dtype} {shape}", kernel, types, integers, blocks, dtype=dtype)
        for name, kernel, types in (
            ("forward", _mask_embeddings_kernel, forward),
            ("backward", _mask_embeddings_backward_kernel, backward),
        )
    ]
