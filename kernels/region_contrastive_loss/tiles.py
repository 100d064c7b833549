"""How the Triton kernels of the region losses are cut, by kernel and dtype.

For bf16 chosen at R 32768, E 768 on an H200, where `python benchmarks/region_loss.py --tiles` times others beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile of pairs, width of a step of its products, warps, depth of the load pipeline."""

    rows: int
    columns: int
    width: int
    num_warps: int
    num_stages: int
    programs: int = 1
    """To a multiprocessor, in the forward: they walk over tiles as long as there are any."""


HALF = {
    "filter": Tiles(128, 128, 64, 4, 3),
    "forward": Tiles(128, 256, 64, 8, 3),
    "online": Tiles(128, 128, 64, 8, 3),
    "sigmoid": Tiles(128, 128, 64, 8, 3),
    "backward": Tiles(128, 128, 64, 4, 3),
}
"""bf16 and fp16, on tensor cores. "online" and "sigmoid" are the forward's other forms, which need more registers."""

FP32 = {
    "filter": Tiles(64, 64, 32, 8, 2),
    "forward": Tiles(64, 64, 32, 8, 2, 2),
    "online": Tiles(64, 64, 32, 8, 2, 2),
    "sigmoid": Tiles(64, 64, 32, 8, 2, 2),
    "backward": Tiles(64, 64, 32, 8, 2),
}
"""fp32, with exact products on the FMA units."""

FROM_CUBLAS = Tiles(32, 256, 64, 8, 1, 4)
"""Where cuBLAS makes the cosines, and the kernels read them."""

COSINES = {"from": "tiles"}
"""Where the cosines of regions and texts come from: "tiles" in registers, or "cublas", a panel of rows in memory."""

PANEL = {"rows": 4096}
"""Rows of weights in memory at a time, in the backward: [rows, N] in the dtype of the products."""


def tiles(kernel: str, dtype: torch.dtype) -> Tiles:
    if COSINES["from"] == "cublas" and kernel != "filter":
        return FROM_CUBLAS
    return (FP32 if dtype == torch.float32 else HALF)[kernel]
