"""mask_embeddings in Triton. Bound by memory: x, the gradient and the output cross the bus once.

A program owns one token, a tile of channels and a few images at a time, whose views are unrolled, so that all of their
loads are in flight at once. In the backward it walks over all images: the sum for the position's gradient stays in its
registers, and needs neither atomics nor scratch memory nor a second kernel.

select_views is the same kernels with ADDED off: rows of `position` then stand in hidden places, and nothing is added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._variants import Variant, variant_of_launch
from .tiles import TRITON, Tiles

WANTED_PROGRAMS = 132 * 4
"""Of the backward, at least: four on each multiprocessor of a large GPU."""
MIN_CHANNELS = 64


@triton.jit
def _mask_embeddings_kernel(
    x_ptr,  # [B, N, C]
    visible_ptr,  # [B, V, N] uint8
    position_ptr,  # [P + N, C]
    out_ptr,  # [B, V, P + N, C]
    B,
    N,
    P,
    C,
    V: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(C, BLOCK_C)
    column, first = tl.program_id(0) % ((P + N) * tiles), tl.program_id(0) // ((P + N) * tiles) * BLOCK_B
    token = column // tiles
    channel = column % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    patch = token - P
    place = token.to(tl.int64) * C + channel
    position = tl.load(position_ptr + place, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    image = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
    inside = (image < B)[:, None] & (channel < C)[None, :]
    x_place = x_ptr + (image * N + patch)[:, None] * C + channel[None, :]
    x = tl.load(x_place, mask=inside & (patch >= 0), other=0.0).to(tl.float32)
    for start in tl.static_range(0, V, 32):
        shown = tl.zeros((BLOCK_B,), tl.int32)  # a bit a view: no load may wait for the store of the view before
        for i in tl.static_range(32):
            if start + i < V:
                byte = visible_ptr + (image * V + start + i) * N + patch
                shown |= (tl.load(byte, mask=(image < B) & (patch >= 0), other=0) != 0).to(tl.int32) << i
        for i in tl.static_range(32):
            if start + i < V:
                # Selected, not multiplied: a NaN in a hidden patch must not leak.
                is_shown = ((shown >> i) & 1)[:, None] != 0
                out = tl.where(is_shown, x, 0.0) + position if ADDED else tl.where(is_shown, x, position)
                view = (image * V + start + i) * (P + N) * C
                tl.store(out_ptr + view[:, None] + place[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mask_embeddings_backward_kernel(
    grad_ptr,  # [B, V, P + N, C]
    visible_ptr,  # [B, V, N] uint8
    x_grad_ptr,  # [B, N, C]
    position_grad_ptr,  # [P + N, C] fp32
    B,
    N,
    P,
    C,
    V: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles = tl.cdiv(C, BLOCK_C)
    token = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    patch = token - P
    column = token.to(tl.int64) * C + channel
    position_grad = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for first in tl.range(0, B, BLOCK_B, num_stages=STAGES):
        image = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
        inside = (image < B)[:, None] & (channel < C)[None, :]
        x_grad = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for v in tl.static_range(V):
            view = image * V + v
            shown = tl.load(visible_ptr + view * N + patch, mask=(image < B) & (patch >= 0), other=0) != 0
            place = grad_ptr + (view * (P + N) * C)[:, None] + column[None, :]
            grad = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            position_grad += grad if ADDED else tl.where(shown[:, None], 0.0, grad)
            x_grad += tl.where(shown[:, None], grad, 0.0)
        x_place = x_grad_ptr + (image * N + patch)[:, None] * C + channel[None, :]
        tl.store(x_place, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside & (patch >= 0))
    tl.store(position_grad_ptr + column, tl.sum(position_grad, 0), mask=channel < C)


def _cut(kernel: str, batch: int, tokens: int, width: int) -> tuple[Tiles, int]:
    """The tiles of a launch, and how many there are of tokens x channels.

    A function of the shape alone, so sums are cut the same way, and give the same bits, on every GPU.
    """
    wanted = TRITON[kernel]
    channels = min(wanted.channels, triton.next_power_of_2(width))
    if kernel == "backward":
        while channels > MIN_CHANNELS and tokens * triton.cdiv(width, channels) < WANTED_PROGRAMS:
            channels //= 2
    images = wanted.images * wanted.channels // channels
    tiles = Tiles(min(images, triton.next_power_of_2(batch)), channels, wanted.num_warps, wanted.stages)
    return tiles, tokens * triton.cdiv(width, channels)


def mask_embeddings(x: Tensor, visible: Tensor, position: Tensor, added: bool = True) -> Tensor:
    """x [B, N, C] fp32, fp16 or bf16, visible [B, V, N], position [P + N, C]  ->  [B, V, P + N, C].

    added: whether positions are added to visible patches too; if not, this is select_views.
    """
    x, visible, position = x.contiguous(), visible.contiguous(), position.contiguous()
    batch, patches, width = x.shape
    views, tokens = visible.shape[1], position.shape[0]
    out = torch.empty(batch, views, tokens, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tiles, columns = _cut("forward", batch, tokens, width)
    _mask_embeddings_kernel[(columns * triton.cdiv(batch, tiles.images),)](
        x,
        visible.view(torch.uint8),
        position,
        out,
        batch,
        patches,
        tokens - patches,
        width,
        V=views,
        ADDED=added,
        BLOCK_B=tiles.images,
        BLOCK_C=tiles.channels,
        num_warps=tiles.num_warps,
    )
    return out


def mask_embeddings_backward(
    grad: Tensor, visible: Tensor, num_prefix_tokens: int, added: bool = True
) -> tuple[Tensor, Tensor]:
    """grad [B, V, P + N, C]  ->  gradients of x [B, N, C] in grad's dtype, and of position [P + N, C] in fp32."""
    grad, visible = grad.contiguous(), visible.contiguous()
    batch, views, tokens, width = grad.shape
    patches = tokens - num_prefix_tokens
    x_grad = torch.empty(batch, patches, width, dtype=grad.dtype, device=grad.device)
    position_grad = torch.empty(tokens, width, dtype=torch.float32, device=grad.device)
    if grad.numel() == 0:
        return x_grad.zero_(), position_grad.zero_()
    tiles, columns = _cut("backward", batch, tokens, width)
    _mask_embeddings_backward_kernel[(columns,)](
        grad,
        visible.view(torch.uint8),
        x_grad,
        position_grad,
        batch,
        patches,
        num_prefix_tokens,
        width,
        V=views,
        ADDED=added,
        BLOCK_B=tiles.images,
        BLOCK_C=tiles.channels,
        STAGES=tiles.stages,
        num_warps=tiles.num_warps,
    )
    return x_grad, position_grad


SHAPES = {"B/16@224": (196, 1, 768), "L/14@336": (576, 1, 1024), "SO400M/14@384": (729, 0, 1152)}
"""Patches, prefix tokens and decoder width of the published recipes: three views of each image."""


def variants() -> list[Variant]:
    """Both kernels, at the shapes of the recipes in bf16 and at the smallest of them in fp16 and fp32."""
    forms = [("bf16", shape) for shape in SHAPES] + [("fp16", "B/16@224"), ("fp32", "B/16@224")]
    return [variant for dtype, shape in forms for variant in _variants_of(dtype, shape)]


def _variants_of(dtype: str, shape: str) -> list[Variant]:
    patches, prefix, width = SHAPES[shape]
    integers = {"B": 64, "N": patches, "P": prefix, "C": width}
    visible, data = {"visible_ptr": "*u8"}, f"*{dtype}"
    forward = {"x_ptr": data, "position_ptr": "*fp32", "out_ptr": data} | visible
    backward = {"grad_ptr": data, "x_grad_ptr": data, "position_grad_ptr": "*fp32"} | visible
    forms = []
    for name, kernel, types in (
        ("forward", _mask_embeddings_kernel, forward),
        ("backward", _mask_embeddings_backward_kernel, backward),
    ):
        tiles, _ = _cut(name, 64, patches + prefix, width)
        constants = {"V": 3, "ADDED": True, "BLOCK_B": tiles.images, "BLOCK_C": tiles.channels}
        constants |= {"STAGES": tiles.stages} if name == "backward" else {}
        label, warps = f"mask_embeddings {name} {dtype} {shape}", tiles.num_warps
        forms.append(variant_of_launch(label, kernel, types, integers, constants, num_warps=warps, dtype=dtype))
    return forms
