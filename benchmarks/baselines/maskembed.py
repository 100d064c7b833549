"""A MaskEmbed step as the public code does it: what locfast's step must equal, and what it is measured against.

Pixels are masked and replicated once a view, every view's embeddings are masked by a product, capped attention writes
its T x T logits and weights, timm's blocks run as timm wrote them. Written from a description of the public code.
"""

from __future__ import annotations

import copy

import torch
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from locfast.methods.maskembed import IMAGE, Draw, MaskEmbed
from locfast.models.softcap import set_softcap


class CappedAttention(vision_transformer.Attention):
    """Attention under a soft cap with everything stored: x [B, T, C] -> [B, T, C]."""

    softcap: float

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        logits = self.q_norm(q) * self.scale @ self.k_norm(k).transpose(-2, -1)
        weights = (self.softcap * torch.tanh(logits / self.softcap)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))


class PublicStep(nn.Module):
    """The default losses of `method`, over a copy of its weights: parameters have the names that they have there.

    Called as the method is: (batch, draw) -> {"loss": scalar}. Settings other than the targets' scale, the cap and the
    views are the paper's: penultimate target, linear head, transformer decoder, mean squared error over all tokens.
    """

    def __init__(self, method: MaskEmbed) -> None:
        super().__init__()
        method = copy.deepcopy(method)
        self.config, self.target_scale = method.config, method.target_scale
        self.teacher, self.encoder, self.head, self.decoder = (
            method.teacher,
            method.encoder,
            method.head,
            method.decoder,
        )
        self.patch_size, self.num_prefix_tokens = self.teacher.patch_size, self.teacher.num_prefix_tokens
        self.grid = self.teacher.grid
        del self.teacher.model.blocks[-1]
        set_softcap(self.encoder, None)
        if self.config.softcap is not None:
            for block in self.encoder.model.blocks:
                block.attn.__class__, block.attn.softcap = CappedAttention, self.config.softcap

    def forward(self, batch: dict, draw: Draw) -> dict[str, Tensor]:
        images = batch["views"][IMAGE]
        target = self.target(images, draw.visible)
        rebuilt = self.decode(self.encode(images), draw.visible)
        return {"loss": self.loss(rebuilt, target)}

    @torch.no_grad()
    def target(self, images: Tensor, visible: Tensor) -> Tensor:
        """images [B, 3, H, W], visible [B, V, N]  ->  [B * V, T, C]."""
        views = visible.shape[1]
        seen = visible.unflatten(2, self.grid).flatten(0, 1)[:, None].to(images.dtype)
        replicated = images.repeat_interleave(views, dim=0)
        seen = F.pad(F.interpolate(seen, scale_factor=self.patch_size), self._left_over(images))
        return self.teacher.model.forward_features(replicated * seen)

    def _left_over(self, images: Tensor) -> tuple[int, int, int, int]:
        """Pixels to the right and below that are in no patch (SO400M/14 at 384 px), as `F.pad` wants them."""
        height, width = (side % patch for side, patch in zip(images.shape[-2:], self.patch_size, strict=True))
        return 0, width, 0, height

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W]  ->  one embedding a token [B, T, C]."""
        return self.head(self.encoder.model.forward_features(images))

    def decode(self, embeddings: Tensor, visible: Tensor) -> Tensor:
        """embeddings [B, T, C], visible [B, V, N]  ->  [B * V, T, C]."""
        views = visible.shape[1]
        seen = F.pad(visible.flatten(0, 1), (self.num_prefix_tokens, 0)).to(embeddings.dtype)[..., None]
        x = embeddings.repeat_interleave(views, dim=0) * seen + self.decoder.position
        for block in self.decoder.blocks:
            x = block(x)
        return self.decoder.output(self.decoder.norm(x))

    def loss(self, rebuilt: Tensor, target: Tensor) -> Tensor:
        """The mean squared error over images, views, tokens and width."""
        wide = self.target_scale.dtype
        return F.mse_loss(rebuilt.to(wide), target.to(wide) * self.target_scale)
