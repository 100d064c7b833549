"""From a frozen backbone to one that trains: what is made anew, and what takes no part."""

from __future__ import annotations

import torch
from torch import nn

from locfast.models.backbone import Backbone


def make_student(backbone: Backbone, *, new_norm: bool, new_last_block: bool) -> Backbone:
    """Turn `backbone`, in place, into a student: trainable, its final norm and perhaps its last block made anew.

    The new norm keeps the backbone's epsilon, so that an export computes the same in plain timm. Models that pool by
    averaging (BEiT) have no norm at that place; they get one, as timm itself builds them for `global_pool=""`.
    Locality Alignment, appendix C.
    """
    backbone.requires_grad_(True)
    backbone.freeze_unused()
    if new_norm or not backbone.has_final_norm:
        backbone.model.norm = nn.LayerNorm(backbone.embed_dim, eps=backbone.norm_eps)
    if new_last_block:
        _initialise(backbone.model.blocks[-1])
    return backbone


@torch.no_grad()
def _initialise(block: nn.Module) -> None:
    """As timm initialises a ViT block: truncated normal matrices of std 0.02, zero biases, norms at one and zero."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
