"""Stochastic depth on a model that is already built."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn

from locfast.models.backbone import Backbone


def set_drop_path(backbone: Backbone, rate: float) -> Backbone:
    """Drop whole branches of block i with probability rate * i / (L - 1), as timm does for drop_path_rate.

    In place, and only while training: neither state-dict keys nor what an export computes depend on it.
    """
    for index, block in enumerate(backbone.blocks):
        own = rate * index / max(1, backbone.depth - 1)
        for branch in ("drop_path1", "drop_path2"):
            setattr(block, branch, DropPath(own) if own else nn.Identity())
    return backbone
