"""How the Triton kernels of soft-capped attention are cut, by kernel, dtype, head dim, length and GPU.

For head dims 64 and 72 in bf16 chosen by sweeps on an H100 (benchmarks/results/nvidia-h100-80gb-hbm3/tiles), for others
by what the compiler shows: registers, spills and shared memory (docs/kernels/softcap_attention.md).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Rows that a program owns and rows of a step of its walk, its warps, depth of its load pipeline.

    Forward and backward_q own queries and walk over keys, backward_kv owns keys and walks over queries.
    """

    own: int
    walk: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """A thread's: 128 lets four programs of 4 warps share a multiprocessor."""
    own_tail: bool = True
    """Whether a last block of few rows is a small one: less work, but a second body, which may need more registers."""


Candidates = tuple[Tiles, ...]
"""The best first, then smaller ones for lengths that would leave much of it empty."""

WIDTHS = (64, 96, 128, 256)
"""Head dims up to each of these have tiles of their own (72 and 80 have two parts, so they count as 96)."""

WGMMA: dict[str, tuple[Candidates, ...]] = {
    "forward": (
        (Tiles(64, 32, 4, 3),),
        (Tiles(128, 64, 8, 3, 128, False), Tiles(64, 32, 4, 3, None, False)),
        (Tiles(128, 64, 8, 2, None, False), Tiles(64, 64, 4, 2, None, False)),
        (Tiles(64, 32, 4, 2, None, False),),
    ),
    "backward_q": (
        (Tiles(64, 32, 4, 3, 96),),
        (Tiles(64, 32, 4, 3, 128, False),),
        (Tiles(64, 32, 4, 3, 168, False),),
        (Tiles(64, 16, 8, 2, None, False),),
    ),
    "backward_kv": (
        (Tiles(64, 32, 4, 3, 128),),
        (Tiles(64, 32, 4, 3, None, False),),
        (Tiles(64, 32, 4, 2, None, False),),
        (Tiles(64, 16, 8, 2, None, False),),
    ),
}
"""bf16 and fp16 on sm_90 and sm_100, whose products read their operands from shared memory."""

MMA: dict[str, tuple[Candidates, ...]] = {
    "forward": (
        (Tiles(128, 64, 8, 3, 128), Tiles(64, 64, 4, 3)),
        (Tiles(64, 32, 4, 2),),
        (Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2)),
        (Tiles(32, 32, 4, 2),),
    ),
    "backward_q": ((Tiles(64, 32, 4, 2),), (Tiles(32, 32, 4, 2),), (Tiles(16, 64, 4, 2),), (Tiles(32, 32, 8, 1),)),
    "backward_kv": ((Tiles(64, 32, 4, 2),), (Tiles(64, 16, 4, 2),), (Tiles(128, 16, 8, 2),), (Tiles(32, 32, 8, 1),)),
}
"""bf16 and fp16 on older GPUs and on sm_120, whose products hold their operands in registers."""

FP32: dict[str, tuple[Candidates, ...]] = {
    "forward": ((Tiles(32, 32, 4, 2),), (Tiles(32, 32, 8, 2),), (Tiles(16, 32, 8, 2),), (Tiles(16, 32, 8, 1),)),
    "backward_q": ((Tiles(16, 32, 4, 1),), (Tiles(32, 32, 8, 1),), (Tiles(32, 32, 8, 1),), (Tiles(16, 16, 8, 1),)),
    "backward_kv": ((Tiles(32, 32, 4, 1),), (Tiles(32, 32, 8, 1),), (Tiles(32, 32, 8, 1),), (Tiles(16, 16, 8, 1),)),
}
"""fp32 everywhere: exact products on the FMA units."""

MAX_PADDING = 1.1
"""How much more padding than the least the preferred tile may have: 257 tokens take 5 blocks of 64, not 3 of 128."""

tiles_override: dict[str, Tiles] = {}
"""Tiles by kernel name ("forward", "backward_q", "backward_kv"), instead of the defaults."""


def tiles(kernel: str, head_dim: int, dtype: torch.dtype, rows: int, arch: int) -> Tiles:
    """Those that a launch takes; `rows`: queries, or for backward_kv keys, that programs share out among them."""
    if kernel in tiles_override:
        return tiles_override[kernel]
    table = FP32 if dtype == torch.float32 else WGMMA if 90 <= arch < 120 else MMA
    candidates = table[kernel][next(i for i, most in enumerate(WIDTHS) if head_dim <= most)]

    def padded(cut: Tiles) -> int:
        return -(-rows // cut.own) * cut.own

    least = min(map(padded, candidates))
    return next(cut for cut in candidates if padded(cut) <= MAX_PADDING * least)


@functools.cache
def architecture(device: torch.device) -> int:
    """80, 90, ...; what an interpreter on a CPU interprets is for 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
