"""Probe heads on frozen features: linear, one hidden layer, and the two-block transformer of the public reference."""

from __future__ import annotations

from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

HeadKind = Literal["linear", "mlp", "transformer"]
Task = Literal["local", "global"]
Intervention = Literal["none", "prefix", "anonymous"]
"""What a transformer head is denied (Locality Alignment, figure 9). prefix: all but the first prefix token (CLS), or
but the mean where there is none; anonymous: which token comes from which place. Its answers then stand at tokens of
their own."""

HIDDEN = 1024
"""Width of the hidden layer of an mlp head (public reference of the probe)."""


class LinearHead(nn.Module):
    """One linear layer on every token."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, C] -> [B, T, K]."""
        return self.output(tokens)


class MlpHead(nn.Module):
    """One hidden layer with a GELU on every token."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, C] -> [B, T, K]."""
        return self.layers(tokens)


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
        return self._answers(tokens + self.position)

    def ask(self, tokens: Tensor) -> Tensor:
        """tokens [B, S, C], whatever S, without positions -> [B, T, K], read at T tokens that are positions alone."""
        asked = self.position.to(tokens.dtype).expand(len(tokens), -1, -1)
        return self._answers(torch.cat([tokens, asked], dim=1))[:, tokens.shape[1] :]

    def _answers(self, x: Tensor) -> Tensor:
        return self.output(self.norm_out(self.blocks(self.norm_in(x))))


class ProbeHead(nn.Module):
    """A head and where it is read: at the patches (local), or at the prefix, or over all tokens where there is none.

    An intervention is for local transformer heads; ValueError for others.
    """

    def __init__(
        self,
        kind: HeadKind,
        task: Task,
        width: int,
        num_classes: int,
        num_prefix: int,
        num_patches: int,
        num_heads: int,
        intervention: Intervention = "none",
    ) -> None:
        super().__init__()
        if intervention != "none" and (kind, task) != ("transformer", "local"):
            raise ValueError(f"an intervention is for local transformer heads, got {kind}, {task}, {intervention}")
        self.task, self.num_prefix, self.intervention = task, num_prefix, intervention
        self.head: nn.Module
        if kind == "transformer":
            answers = num_patches if intervention != "none" else num_prefix + num_patches
            self.head = TransformerHead(width, num_classes, answers, num_heads)
        else:
            self.head = (LinearHead if kind == "linear" else MlpHead)(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, P + N, C] -> logits [B, N, K] for local, [B, K] for global."""
        if self.intervention != "none":
            assert isinstance(self.head, TransformerHead)
            return self.head.ask(self._prefix(tokens) if self.intervention == "prefix" else tokens)
        if isinstance(self.head, LinearHead):
            # A linear head commutes with the average, so only the tokens that are read need be seen.
            return self.head(self._read(tokens))
        return self._read(self.head(tokens))

    def _prefix(self, tokens: Tensor) -> Tensor:
        return tokens[:, :1] if self.num_prefix else tokens.mean(1, keepdim=True)

    def _read(self, tokens: Tensor) -> Tensor:
        if self.task == "local":
            return tokens[:, self.num_prefix :]
        return (tokens[:, : self.num_prefix] if self.num_prefix else tokens).mean(1)
