"""What a backbone's attention looks at: its probabilities, recomputed beside the forward pass.

Fused attention gives values and no map. The map is recomputed from what the block's attention gets, and the tokens go
on through the block as ever, so a backbone that is watched computes what it computes unwatched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.models.attention import products, queries_keys_values
from locfast.models.backbone import Backbone
from locfast.models.blocks import Placed, run_blocks

LARGEST = 1 << 28
"""Bytes of probabilities that are made at a time: those of 12 images in ViT-L/14 at 336 px (16 x 577 x 577 each)."""


def attention_map(
    attn: Any, x: Tensor, softcap: float | None = None, rope: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax of the logits that `attend` computes for the same arguments, cap, bias and rotation included.

    x [B, T, C] -> [B, H, T, T] fp32 (fp64 for fp64 weights); row i is what query i looks at, and sums to one. Queries
    and keys are in the dtype that autocast gives them, logits and softmax are not rounded below fp32.
    """
    softcap = getattr(attn, "softcap", None) if softcap is None else softcap
    q, k, _ = queries_keys_values(attn, products(attn, x), rope)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        logits = q.to(compute) @ k.to(compute).transpose(-2, -1) * attn.scale
        logits = logits if bias is None else logits + bias.to(compute)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits.softmax(-1)


@dataclass(frozen=True)
class Layer:
    """One block at work on a batch."""

    number: int
    """0 for the first block."""
    placed: Placed
    softcap: float | None
    input: Tensor  # [B, T, C], before the block's first norm
    output: Tensor  # [B, T, C]

    def attention(self) -> Iterator[Tensor]:
        """Probabilities [b, H, T, T] of the images, some at a time, in their order."""
        block, rope, bias = self.placed
        tokens = self.input.shape[1]
        count = max(1, LARGEST // (4 * block.attn.num_heads * tokens * tokens))
        for some in self.input.split(count):
            yield attention_map(block.attn, block.norm1(some), self.softcap, rope, bias)


def layer_by_layer(backbone: Backbone, images: Tensor, softcap: float | None = None) -> Iterator[Layer]:
    """Every block of `forward_features(images, softcap)` in turn; the last one's output lacks the final norm alone.

    images [B, 3, H, W], normalised. Raises UserError for blocks that only timm knows how to run.
    """
    check_maps(backbone)
    x = backbone.add_prefix_and_position(backbone.embed_patches(images))
    for number, placed in enumerate(backbone.placed_blocks(None, 0, None)):
        before, x = x, run_blocks([placed], x, softcap)
        yield Layer(number, placed, softcap, before, x)


def check_maps(backbone: Backbone) -> None:
    """Raise UserError where the attention of `backbone` is not known."""
    if not backbone.knows_blocks:
        block: Any = backbone.blocks[0]
        raise UserError(
            f"--model {backbone.name}: its blocks ({type(block).__name__}, {type(block.attn).__name__}) run only as "
            "timm wrote them, so what their attention looks at is not known. Leave that model out; locfast knows the "
            "blocks of timm's VisionTransformer, Eva and Beit, pre-norm."
        )
