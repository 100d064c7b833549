"""Learning rates that fall with a parameter's distance from the output, as BEiT and EVA fine-tune."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

Named = Iterable[tuple[str, Tensor]]

BLOCK = re.compile(r"(?:^|\.)(?:blocks|resblocks|layers|layer|block|h)\.(\d+)\.")
"""What open_clip, timm and transformers call a list of blocks."""
BELOW = (
    "patch_embed",
    "token",
    "pos_embed",
    "positional",
    "embeddings",
    "norm_pre",
    "cls_emb",
    "rope",
    "wte",
    "wpe",
    "shared",
)
"""Parts of names of what stands before the first block; all else outside of blocks stands behind the last."""


def layer(name: str, depth: int) -> int:
    """0 for what stands before the blocks, 1 .. depth for blocks, depth + 1 for norm and projection behind them."""
    if block := BLOCK.search(name):
        return int(block[1]) + 1
    return 0 if any(part in name for part in BELOW) else depth + 1


def depth_of(named: Named) -> int:
    """The number of blocks in a tower, by the names of its parameters."""
    return max((int(block[1]) + 1 for name, _ in named if (block := BLOCK.search(name))), default=0)


def decayed_groups(
    named: Iterable[tuple[str, Tensor]], decay: float, weight_decay: float, *, scale: float = 1.0, every: bool = False
) -> list[dict[str, Any]]:
    """Optimiser groups of a tower's trainable parameters, with `lr_scale` = scale * decay^(depth + 1 - layer).

    Norm and projection behind the last block have `scale` itself, the last block decay times that, and so on down to
    the embeddings. weight_decay: of matrices, and 0 for biases, norms and other tensors of one dimension; `every`:
    of those too.
    """
    named = list(named)
    depth = depth_of(named)
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault((layer(name, depth), every or parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": scale * decay ** (depth + 1 - number),
        }
        for (number, decays), parameters in sorted(groups.items())
    ]
