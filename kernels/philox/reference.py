"""Philox-4x32-10 in plain torch integer operations: the same bits on every device.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), the generator that CUDA and
Triton use too. All words live in int64 tensors and hold values in 0 .. 2^32 - 1.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Four random 32-bit words for each counter.

    counter [..., 4] int64, key two 32-bit ints  ->  [..., 4] int64, each in 0 .. 2^32 - 1.
    """
    return torch.stack(rounds((counter & MASK32).unbind(-1), key), dim=-1)


def rounds(words: Iterable[Any], key: tuple[int, int]) -> list[Any]:
    """The ten rounds on the four words of every counter: int64 tensors, or arrays of numpy, 0 .. 2^32 - 1."""
    c0, c1, c2, c3 = words
    k0, k1 = key
    for _ in range(ROUNDS):
        # Products of two 32-bit words wrap in int64, but their 64 bits are right, so the high word is too.
        p0, p1 = c0 * ROUND_MULTIPLIERS[0], c2 * ROUND_MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & MASK32 ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) & MASK32 ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK32, (k1 + KEY_INCREMENTS[1]) & MASK32
    return [c0, c1, c2, c3]
