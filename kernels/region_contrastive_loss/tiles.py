"""How the Triton kernels of the region losses are cut, by kernel and dtype.

For bf16 chosen at R 32768, E 768 on an H200, where `python benchmarks/region_loss.py --tiles` times others beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _backend


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
"""bf16 and fp16 on sm_90 and sm_100. "online" and "sigmoid", the forward's other forms, need more registers."""

OLDER = {kernel: Tiles(128, 64, 32, 8, 3) for kernel in HALF}
"""bf16 and fp16 on older GPUs and on sm_120, which have less shared memory and hold operands in registers."""

FP32 = {
    "filter": Tiles(64, 64, 32, 8, 1),
    "forward": Tiles(64, 64, 32, 8, 1, 2),
    "online": Tiles(64, 64, 32, 8, 1, 2),
    "sigmoid": Tiles(64, 64, 32, 8, 1, 2),
    "backward": Tiles(64, 64, 32, 8, 1),
}
"""fp32, with exact products on the FMA units."""

FROM_CUBLAS = Tiles(32, 256, 64, 8, 1, 4)
"""Where cuBLAS makes the cosines, and the kernels read them. The online form, rarely wanted, makes its own."""

ROWS = {"to a program": 4}
"""Of the kernels that work row by row."""

COSINES = {"from": "tiles"}
"""Where the cosines of regions and texts come from: "tiles" in registers, or "cublas", a panel of rows in memory."""

PANEL = {"rows": 5632}
"""Rows of weights in memory at a time, in the backward: [rows, N] in the dtype of the products.

An H200's 132 multiprocessors then have a tile of 128 x 256 each of a product with E 768."""


def tiles(kernel: str, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Those that a launch takes; what an interpreter on a CPU interprets is for sm_90."""
    return of_architecture(kernel, dtype, _backend.capability(device)[0])


def of_architecture(kernel: str, dtype: torch.dtype, major: int) -> Tiles:
    if COSINES["from"] == "cublas" and kernel not in ("filter", "online"):
        return FROM_CUBLAS
    return (FP32 if dtype == torch.float32 else HALF if major in (9, 10) else OLDER)[kernel]
