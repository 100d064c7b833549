"""Probe heads on frozen features: linear, and the two-block transformer of the public reference (patch-seg)."""

from __future__ import annotations

from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

HeadKind = Literal["linear", "transformer"]
Task = Literal["local", "global"]


class LinearHead(nn.Module):
    """One linear layer on every token."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, C] -> [B, T, K]."""
        return self.output(tokens)


class TransformerHead(nn.Module):
    """Learned positions, LayerNorm, two blocks of the backbone's width and heads, LayerNorm, linear."""

    def __init__(self, width: int, num_classes: int, num_tokens: int, num_heads: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, num_heads, qkv_bias=False, init_values=0.01) for _ in range(2)))
        self.norm_out = nn.LayerNorm(width)
        self.output = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, C] -> [B, T, K]."""
        return self.output(self.norm_out(self.blocks(self.norm_in(tokens + self.position))))


class ProbeHead(nn.Module):
    """A head and where it is read: at the patches (local), or at the prefix, or over all tokens where there is none."""

    def __init__(
        self,
        kind: HeadKind,
        task: Task,
        width: int,
        num_classes: int,
        num_prefix: int,
        num_patches: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.task, self.num_prefix = task, num_prefix
        self.head: nn.Module = (
            LinearHead(width, num_classes)
            if kind == "linear"
            else TransformerHead(width, num_classes, num_prefix + num_patches, num_heads)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, P + N, C] -> logits [B, N, K] for local, [B, K] for global."""
        if isinstance(self.head, LinearHead):
            # A linear head commutes with the average, so only the tokens that are read need be seen.
            return self.head(self._read(tokens))
        return self._read(self.head(tokens))

    def _read(self, tokens: Tensor) -> Tensor:
        if self.task == "local":
            return tokens[:, self.num_prefix :]
        return (tokens[:, : self.num_prefix] if self.num_prefix else tokens).mean(1)
