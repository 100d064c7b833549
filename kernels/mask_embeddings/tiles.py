"""How the kernels of mask_embeddings are cut, by direction. An H200 has timed them at the shapes of ViT-B/16 alone.

A benchmark overrides entries (`benchmarks/mask_embeddings.py --tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Of a Triton program: images and channels of a step, warps, and the depth of the backward's load pipeline."""

    images: int
    channels: int
    num_warps: int
    stages: int = 1


@dataclass(frozen=True)
class Rows:
    """Of a CUDA block: images whose loads a thread has in flight (1 or 2), and in the backward the warps among which
    the images are dealt out (at most 16; 0 for what the shape asks for)."""

    images: int
    rows: int = 0


TRITON = {"forward": Tiles(8, 256, 4), "backward": Tiles(8, 256, 8)}
"""Where there are enough tokens and channels."""
CUDA = {"forward": Rows(2), "backward": Rows(1)}
