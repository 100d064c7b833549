"""torch.compile block by block: one compilation for each kind of block, however deep the network is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BACKEND = "inductor"
KINDS = 64
"""Compilations of one function at most, then it runs uncompiled; torch's own 8 are few for three networks in training
and validation with a last, smaller batch."""


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for exact shapes. A block among its arguments is taken apart: blocks alike share the code."""
    torch._dynamo.config.recompile_limit = max(KINDS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False, backend=BACKEND)


def compile_blocks(root: nn.Module, has_runner: Callable[[nn.Module], bool]) -> int:
    """Mark or compile every block of every network inside `root`; how many there are.

    Networks are what holds a list of modules called `blocks`. Those blocks that `has_runner` names are run by
    `blocks.run_blocks`, which looks for the mark; all others are called as modules. State-dict keys do not change.
    """
    lists = [getattr(network, "blocks", None) for network in root.modules()]
    found = [block for blocks in lists if isinstance(blocks, nn.Sequential | nn.ModuleList) for block in blocks]
    blocks = list(dict.fromkeys(found))  # a Backbone's blocks are those of the model inside
    for block in blocks:
        if has_runner(block):
            block.compiled = True  # type: ignore[assignment]
        else:
            block.compile(dynamic=False, backend=BACKEND)
    return len(blocks)
