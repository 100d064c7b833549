"""All pairs of a rank's regions with the texts of one rank: what a backend works on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
FREE = 100.0
"""Triton's sums are of 2^(logit - shift), logits in powers of two, with a constant shift in a maximum's place: what the
highest logit there can be exceeds this by. 2^20 terms of 2^FREE are within fp32."""
SAFE = 113.0
"""The highest logit up to which 2^(logit - shift) is a normal fp32 number for every cosine: that of a scale of 77."""
FAINT = -82.0
"""Above SAFE the least numbers are flushed to zero: 2^20 of them, under 2^-126 each, are nothing beside 2^FAINT."""


@dataclass(frozen=True)
class Block:
    """Pairs (i, j) of region i and text j. Rows and columns that only fill up a tile are not valid, and zeros."""

    regions: Tensor
    """[M, E], unit rows in the dtype of the products."""
    texts: Tensor
    """[N, E], likewise: of the rank that they belong to."""
    captions: Tensor
    """[M, E]: the texts of the regions, for the filter."""
    row_valid: Tensor
    """[M] bool."""
    column_valid: Tensor
    """[N] bool."""
    own: bool
    """Whether they are the rank's own texts: then pair (i, i) is a positive, which is in none of a block's sums."""
    scale: Tensor
    """[] fp64, logits per cosine."""
    bias: Tensor | None
    """[] fp64, added to the logits, for the sigmoid loss; None for the contrastive one."""
    threshold: float | None
    """Cosine of two captions above which their pair is dropped."""
    dropped: Tensor | None = None
    """[M, ceil(N / 32)] int32, a bit for each pair that counts nowhere: filtered, positive or not valid; where kept."""

    def keeping(self, dropped: Tensor) -> Block:
        return replace(self, dropped=dropped)


def weight_unit(dtype: torch.dtype) -> float:
    """What a weight of 1 counts in `dtype`. Weights reach 2, and fp16 would lose those under 6e-8: a half of 2^16."""
    return 2.0**14 if dtype == torch.float16 else 1.0


TILE = (256, 64)
"""Rows and width of Triton's tiles of units: its operands are filled up with zeros, so that no load needs a mask."""


def padded(shape: torch.Size, backend: str) -> tuple[int, int]:
    """Shape of the unit rows that a backend works on."""
    rows, width = shape
    if backend != "triton":
        return rows, width
    return -(-rows // TILE[0]) * TILE[0], -(-width // TILE[1]) * TILE[1]
