"""An encoder of masked images and a decoder that rebuilds what is hidden: MAE's, and SimMIM's as an option."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from locfast.models.backbone import Backbone
from locfast.models.pixel_decoder import LinearPixels, PixelDecoder
from locfast.models.scratch import TOKEN_STD


class Masked(NamedTuple):
    """What encoder and decoder made of a masked view."""

    tokens: Tensor
    """[B, P + K, C], or [B, P + N, C] with [MASK] tokens among them."""
    patches: Tensor
    """[B, K, C] of visible patches; [B, N, C] where hidden ones are wanted too, the decoder's in their places."""
    kept: Tensor
    """[B, K] int64: which patches are visible."""
    pixels: Tensor | None
    """[B, N, 3hw], of a view that is rebuilt."""


class MaskedAutoencoder(nn.Module):
    """MAE: the encoder sees visible patches alone, and a transformer of its own width makes pixels of all.

    with_hidden: tokens of hidden patches are wanted too; one more linear layer takes the decoder's to the encoder's
    width. New weights are drawn from torch's generator.
    """

    def __init__(self, encoder: Backbone, width: int, depth: int, heads: int, with_hidden: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = PixelDecoder(encoder, width, depth, heads)
        self.lift = nn.Linear(width, encoder.embed_dim) if with_hidden else None
        self.checkpointing = False

    def forward(self, images: Tensor, visible: Tensor, kept: Tensor, rebuild: bool) -> Masked:
        """images [B, 3, H, W], visible [B, N] bool, the same as indices kept [B, K]; rebuild: make pixels."""
        tokens = self.encoder(images, kept=kept, checkpointing=self.checkpointing)
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        pixels = None
        if rebuild or self.lift is not None:
            pixels, decoded = self.decoder(tokens, kept, self.checkpointing)
            if self.lift is not None:
                lifted = self.lift(decoded).to(patches.dtype)
                patches = lifted.scatter(1, kept[:, :, None].expand_as(patches), patches)
        return Masked(tokens, patches, kept, pixels)


class MaskTokenAutoencoder(nn.Module):
    """SimMIM: hidden patches are [MASK] tokens in the encoder, and one linear layer makes pixels of its tokens.

    with_hidden: as in MaskedAutoencoder; here the encoder itself has tokens of hidden patches.
    """

    def __init__(self, encoder: Backbone, with_hidden: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = LinearPixels(encoder)
        self.mask_token = nn.Parameter(torch.randn(1, 1, encoder.embed_dim) * TOKEN_STD)
        self.with_hidden = with_hidden
        self.checkpointing = False

    def forward(self, images: Tensor, visible: Tensor, kept: Tensor, rebuild: bool) -> Masked:
        """As in MaskedAutoencoder."""
        patches = self.encoder.embed_patches(images)
        patches = torch.where(visible[:, :, None], patches, self.mask_token.to(patches.dtype))
        tokens = self.encoder.encode(patches, checkpointing=self.checkpointing)
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        pixels = self.decoder(tokens) if rebuild else None
        return Masked(tokens, patches if self.with_hidden else take(patches, kept), kept, pixels)


def take(tokens: Tensor, kept: Tensor) -> Tensor:
    """The tokens at some places: tokens [B, N, C], kept [B, K] int64 -> [B, K, C]."""
    return tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
