"""Compile-time arguments and options that launches and the list of compiled forms share."""

from typing import Any

import torch
import triton
from torch import Tensor

from . import tiles
from .tiles import Tiles

GROUP = 16
"""Tiles below each other that run at one time."""
SUMS = 64
"""Rows or columns to a program of the kernels that finish their sums."""


def products(units: Tensor, cut: Tiles) -> dict[str, Any]:
    return {
        "WIDTH": units.shape[1],
        "BLOCK_M": cut.rows,
        "BLOCK_N": cut.columns,
        "BLOCK_K": cut.width,
        "FP32": units.dtype == torch.float32,
    }


def options(cut: Tiles) -> dict[str, Any]:
    return {"num_warps": cut.num_warps, "num_stages": cut.num_stages, "enable_fp_fusion": True}


def row_constants(width: int, padded_width: int) -> dict[str, int]:
    """Of the kernels that work on rows, with their warps: one to a row, more to a wide one."""
    block = triton.next_power_of_2(padded_width)
    rows = max(1, min(1, 2048 / block) * tiles.ROWS["to a program"])
    return {
        "E": width,
        "WIDTH": padded_width,
        "BLOCK": block,
        "ROWS": int(rows),
        "num_warps": max(4, min(16, block // 512)),
    }
