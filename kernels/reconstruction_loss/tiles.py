"""How the Triton kernels of reconstruction_loss are cut, by direction. An H200 has timed them at ViT-B/16 shapes alone.

A benchmark overrides entries (`benchmarks/reconstruction_loss.py --tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Tokens of a program, channels of a step, and warps."""

    tokens: int
    channels: int
    num_warps: int


TRITON = {"forward": Tiles(1, 256, 1), "backward": Tiles(4, 256, 4)}
"""One token to a warp, 16 bytes of bf16 to a thread and load. An H200's forward gains 3 % by programs of one warp."""
