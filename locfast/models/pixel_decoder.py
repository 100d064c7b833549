"""From encoded tokens back to pixels: MAE's transformer decoder, and SimMIM's single layer."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from locfast.models.backbone import Backbone
from locfast.models.blocks import Placed, run_blocks
from locfast.models.scratch import TOKEN_STD, initialise, sincos_positions

NORM_EPS = 1e-6
"""Of the decoder's norms, and beside the variance of a patch."""


def patch_pixels(images: Tensor, patch_size: tuple[int, int], normalise: bool) -> Tensor:
    """images [B, 3, H, W] -> the pixels of every patch [B, N, 3 * h * w], in fp32.

    normalise: less their mean, over their standard deviation (unbiased, its square plus 1e-6), patch by patch.
    """
    height, width = patch_size
    rows, columns = images.shape[2] // height, images.shape[3] // width
    pixels = images[..., : rows * height, : columns * width].float()
    pixels = pixels.unflatten(3, (columns, width)).unflatten(2, (rows, height))
    pixels = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    if not normalise:
        return pixels
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return (pixels - mean) * torch.rsqrt(variance + NORM_EPS)


def num_pixels(backbone: Backbone) -> int:
    """How many numbers a patch is."""
    return 3 * backbone.patch_size[0] * backbone.patch_size[1]


class PixelDecoder(nn.Module):
    """MAE's decoder: visible tokens at their places, [MASK] tokens at all others, fixed positions, blocks, pixels."""

    position: Tensor

    def __init__(self, backbone: Backbone, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.num_prefix_tokens = backbone.num_prefix_tokens
        self.embed = nn.Linear(backbone.embed_dim, width)
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]  # timm calls it
            for _ in range(depth)
        )
        self.norm = norm(width)
        self.output = nn.Linear(width, num_pixels(backbone))
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * TOKEN_STD)
        places = [torch.zeros(self.num_prefix_tokens, width), sincos_positions(backbone.grid, width)]
        self.register_buffer("position", torch.cat(places), persistent=False)
        initialise(self)

    def forward(self, tokens: Tensor, kept: Tensor, checkpointing: bool = False) -> tuple[Tensor, Tensor]:
        """tokens [B, P + K, C] of patches `kept` [B, K] -> pixels [B, N, 3hw] and the tokens they come from [B, N, D].

        checkpointing: recompute activations in the backward pass.
        """
        prefix, shown = self.embed(tokens).tensor_split([self.num_prefix_tokens], dim=1)
        patches = len(self.position) - self.num_prefix_tokens
        everywhere = self.mask_token.to(shown.dtype).expand(len(shown), patches, -1)
        placed = everywhere.scatter(1, kept[:, :, None].expand_as(shown), shown)
        x = torch.cat([prefix, placed], dim=1) + self.position
        x = run_blocks([Placed(block) for block in self.blocks], x, checkpointing=checkpointing)
        decoded = self.norm(x)[:, self.num_prefix_tokens :]
        return self.output(decoded), decoded


class LinearPixels(nn.Module):
    """SimMIM's decoder: one linear layer, from the encoder's own token of a patch to its pixels."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.num_prefix_tokens = backbone.num_prefix_tokens
        self.output = nn.Linear(backbone.embed_dim, num_pixels(backbone))
        initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, P + N, C] -> pixels [B, N, 3hw]."""
        return self.output(tokens[:, self.num_prefix_tokens :])
