"""What turns masked patch embeddings into a reconstruction of the teacher's masked output.

Locality Alignment, section 3.2 and appendix C; the weak decoders are those of equation 2 and table 1.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from locfast.kernels.mask_embeddings import mask_embeddings
from locfast.models.backbone import Backbone
from locfast.models.blocks import Placed, Views, run_blocks
from locfast.models.uncapped_attention import Implementation


class TransformerDecoder(nn.Module):
    """A shallow pre-norm transformer over masked embeddings, as wide as the backbone, its attention uncapped.

    Hidden patches and all prefix tokens enter as zeros; learned positions tell the decoder where they are.
    """

    def __init__(self, backbone: Backbone, depth: int, layer_scale: float, attention: Implementation = "sdpa") -> None:
        super().__init__()
        self.attention = attention
        width = backbone.embed_dim
        tokens = backbone.num_prefix_tokens + backbone.num_patches
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(
                width,
                backbone.num_heads,
                mlp_ratio=4.0,
                qkv_bias=backbone.qkv_bias,
                init_values=layer_scale,
                act_layer=nn.SiLU if backbone.mlp_kind == "swiglu" else backbone.act_layer,
                mlp_layer=SwiGLU if backbone.mlp_kind == "swiglu" else Mlp,
                norm_layer=partial(nn.LayerNorm, eps=backbone.norm_eps),  # type: ignore[arg-type]  # timm calls it
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=backbone.norm_eps)
        self.output = nn.Linear(width, width)

    def forward(self, embeddings: Tensor, visible: Tensor, checkpointing: bool = False) -> Tensor:
        """embeddings [B, N, C], visible [B, V, N] bool  ->  [B, V, P + N, C].

        checkpointing: recompute activations in the backward pass.
        """
        tokens = mask_embeddings(embeddings, visible, self.position).flatten(0, 1)
        shown = (embeddings + self.position[-embeddings.shape[1] :]).to(embeddings.dtype)  # as mask_embeddings rounds
        # A view of the parameter: torch's counter of FLOPs takes no leaf for a module's input.
        hidden = self.position[:].to(embeddings.dtype)
        views = Views(shown, hidden, visible)
        placed = [Placed(block) for block in self.blocks]
        tokens = run_blocks(placed, tokens, None, self.attention, views, checkpointing)
        return self.output(self.norm(tokens)).unflatten(0, visible.shape[:2])


class PooledDecoder(nn.Module):
    """No network at all: the visible embeddings' sum (equation 2) or mean (table 1) stands for the teacher's CLS."""

    def __init__(self, average: bool) -> None:
        super().__init__()
        self.average = average

    def forward(self, embeddings: Tensor, visible: Tensor, checkpointing: bool = False) -> Tensor:
        """embeddings [B, N, C], visible [B, V, N] bool  ->  [B, V, 1, C]; there is nothing to recompute."""
        kept = visible.to(embeddings.dtype)
        total = kept @ embeddings
        if self.average:
            total = total / kept.sum(-1, keepdim=True).clamp(min=1)
        return total.unsqueeze(2)
