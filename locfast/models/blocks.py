"""timm's transformer blocks, one after the other: over images, over masked views, compiled or not.

Norms, LayerScale, drop path and MLP are timm's modules; attention is run by `locfast.models.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from locfast.kernels.select_views import select_views
from locfast.models.attention import attend, attend_products, products, timm_class
from locfast.models.compiled import compiled
from locfast.models.fp8 import Fp8Linear
from locfast.models.uncapped_attention import Implementation

BLOCKS: tuple[type[nn.Module], ...] = (vision_transformer.Block, eva.EvaBlock, beit.Block)
"""Blocks whose arithmetic `run_block` knows: pre-norm, attention, pre-norm, MLP."""


class Placed(NamedTuple):
    """A block and what its attention is told of places, as in `attend`."""

    block: Any
    rope: Tensor | None = None
    bias: Tensor | None = None


class Views(NamedTuple):
    """Masked views in parts: what `select_views` puts together."""

    shown: Tensor
    """[B, N, C], the tokens of visible patches."""
    hidden: Tensor
    """[P + N, C], the tokens of prefixes and hidden patches."""
    visible: Tensor
    """[B, V, N] bool."""


def is_known_block(block: nn.Module) -> bool:
    """Whether `run_block` can run this block itself."""
    return type(block) in BLOCKS and timm_class(getattr(block, "attn", block)) is not None


def run_block(
    block: Any,
    x: Tensor,
    softcap: float | None = None,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
    uncapped: Implementation = "sdpa",
) -> Tensor:
    """One pre-norm transformer block. x [B, T, C] -> [B, T, C]; all else as in `attend`."""
    return run_blocks([Placed(block, rope, bias)], x, softcap, uncapped)


def run_blocks(
    placed: Sequence[Placed],
    x: Tensor,
    softcap: float | None = None,
    uncapped: Implementation = "sdpa",
    views: Views | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """Blocks one after the other. x [B, T, C] -> [B, T, C]; softcap and uncapped as in `attend`.

    views: what x, then [B * V, T, C], was put together from. Before the first attention a visible token is the same in
    every view and a hidden one in every image, so the first block's norm and its product for queries, keys and values
    are made once an image and once a step, not V times an image, and picked for the views. Exact.
    checkpointing: recompute activations in the backward pass.
    """
    normed: Tensor | None = None
    for index, (block, rope, bias) in enumerate(placed):
        following = placed[index + 1].block if index + 1 < len(placed) else None
        # a block ends with the norm of the next, so that a compiler makes one pass of that and the sum before it
        norm = None if following is None or checkpointing or in_fp8(following) else following.norm1
        if index == 0 and views is not None and getattr(block.attn, "gate", None) is None:
            run = partial(_runner(block, _run_on_views), block, norm, views=views)
        else:
            if normed is None and not (checkpointing or in_fp8(block)):  # those make it inside
                normed = for_product(block.norm1(x))
            run = partial(_runner(block, _run), block, norm, normed=normed)
        place: dict[str, Any] = {"softcap": softcap, "rope": rope, "bias": bias, "uncapped": uncapped}
        x, normed = checkpoint(run, x, use_reentrant=False, **place) if checkpointing else run(x, **place)
    return x


def in_fp8(block: Any) -> bool:
    """Whether the block's first product quantises what it gets: from the norm's own fp32, in one pass with the norm."""
    return isinstance(block.attn.qkv if block.attn.qkv is not None else block.attn.q_proj, Fp8Linear)


def _runner(block: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function) if getattr(block, "compiled", False) else function


def _run(
    block: Any,
    norm: nn.Module | None,
    x: Tensor,
    normed: Tensor | None,
    softcap: float | None,
    rope: Tensor | None,
    bias: Tensor | None,
    uncapped: Implementation,
) -> tuple[Tensor, Tensor | None]:
    """A block over x, of which `normed` is its first norm if known; and what `norm` makes of the result."""
    normed = block.norm1(x) if normed is None else normed
    return _finish(block, norm, x, attend(block.attn, normed, softcap, rope, bias, uncapped=uncapped))


def _run_on_views(
    block: Any,
    norm: nn.Module | None,
    x: Tensor,
    views: Views,
    softcap: float | None,
    rope: Tensor | None,
    bias: Tensor | None,
    uncapped: Implementation,
) -> tuple[Tensor, Tensor | None]:
    attn, visible = block.attn, views.visible
    pairs = zip(products(attn, block.norm1(views.shown)), products(attn, block.norm1(views.hidden)), strict=True)
    picked = tuple(select_views(shown, hidden, visible).flatten(0, 1) for shown, hidden in pairs)
    attended = attend_products(attn, picked, x, softcap, rope, bias, uncapped=uncapped)
    return _finish(block, norm, x, attended)


def _finish(block: Any, norm: nn.Module | None, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
    """A block from behind its attention on: both residual sums, and the MLP."""
    x = x + block.drop_path1(_scale(block, 1, attended))
    x = x + block.drop_path2(_scale(block, 2, block.mlp(block.norm2(x))))
    return x, None if norm is None else for_product(norm(x))


def for_product(x: Tensor) -> Tensor:
    """x as autocast hands it to a linear layer: half the bytes of a norm's fp32."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _scale(block: Any, branch: int, x: Tensor) -> Tensor:
    """LayerScale of branch 1 (attention) or 2 (MLP): a module in timm's ViT, a parameter in its BEiT and EVA."""
    if hasattr(block, f"ls{branch}"):
        return getattr(block, f"ls{branch}")(x)
    gamma = getattr(block, f"gamma_{branch}")
    return x if gamma is None else gamma * x
