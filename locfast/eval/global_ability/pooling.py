"""What of a backbone's tokens stands for the whole image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.models.backbone import Backbone
from locfast.models.joint import has_cls

Pool = Literal["cls", "mean", "cls+mean"]
Embed = Callable[[Tensor], Tensor]
"""Tokens behind the final norm [B, T, C] -> one vector an image [B, E]."""


def pick_pool(backbone: Backbone, asked: Pool | None, name: str) -> Pool:
    """`asked`, or by default the CLS token where there is one and the mean of patches elsewhere.

    Raises UserError where a CLS token is asked for that `name` has not.
    """
    if asked is None:
        return "cls" if has_cls(backbone) else "mean"
    if "cls" in asked and not has_cls(backbone):
        raise UserError(f"--pool {asked}: {name} has no CLS token. Type --pool mean, or leave --pool out.")
    return asked


def pooled(backbone: Backbone, pool: Pool) -> Embed:
    """The CLS token, the mean of the patch tokens, or one behind the other [B, 2C] (as in DINO and DINOv2)."""
    first_patch = backbone.num_prefix_tokens

    def embed(tokens: Tensor) -> Tensor:
        parts = {"cls": lambda: tokens[:, 0], "mean": lambda: tokens[:, first_patch:].mean(1)}
        return torch.cat([parts[name]() for name in pool.split("+")], dim=-1)

    return embed
