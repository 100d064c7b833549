"""Every random number of locfast: a pure function of (seed, epoch, sample index, stream name).

Nothing here has state, so masks, crops and the order of samples depend neither on ranks, workers and batch size nor
on what was drawn before. Streams are named ("maskembed.visible", "crop.image"); two names never share numbers.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from locfast.kernels.philox import MASK32, philox, rounds

SMALL = 1 << 14
"""Up to so many blocks of four words on the CPU are made by numpy, whose calls cost less than torch's: the order of a
batch of 64 images takes 6 ms instead of 14 (2 cores)."""


@dataclass(frozen=True)
class Keys:
    """Who draws: the run's seed, and for every sample of a batch its epoch and its index in the dataset."""

    seed: int
    epoch: Tensor  # [B] int64
    index: Tensor  # [B] int64, 0 .. 2^32 - 1

    @staticmethod
    def of(seed: int, epoch: int, index: int) -> Keys:
        """Keys of a single sample (a batch of one)."""
        return Keys(seed, torch.tensor([epoch]), torch.tensor([index]))

    def to(self, device: torch.device | str) -> Keys:
        return Keys(self.seed, self.epoch.to(device), self.index.to(device))

    def __len__(self) -> int:
        return len(self.index)


def random_words(keys: Keys, stream: str, count: int) -> Tensor:
    """`count` random 32-bit words for every sample of `keys`, on the device of `keys`: [B, count] int64."""
    blocks = -(-count // 4)
    device, batch = keys.index.device, len(keys)
    seed = keys.seed & 0xFFFFFFFFFFFFFFFF
    key, stream_key = (seed & 0xFFFFFFFF, seed >> 32), zlib.crc32(stream.encode())
    if device.type == "cpu" and type(keys.index) is Tensor and batch * blocks <= SMALL:
        words = np.empty((4, batch, blocks), dtype=np.int64)
        words[0], words[3] = np.arange(blocks), stream_key
        words[1], words[2] = keys.epoch.numpy()[:, None], keys.index.numpy()[:, None]
        made = torch.from_numpy(np.stack(rounds(words & MASK32, key), axis=-1))
        return made.reshape(batch, blocks * 4)[:, :count]
    counter = torch.empty(batch, blocks, 4, dtype=torch.int64, device=device)
    counter[..., 0] = torch.arange(blocks, device=device)
    counter[..., 1] = keys.epoch[:, None]
    counter[..., 2] = keys.index[:, None]
    counter[..., 3] = stream_key
    return philox(counter, key).reshape(batch, blocks * 4)[:, :count]


def uniform(keys: Keys, stream: str, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) for every sample: [B, count] fp32, multiples of 2^-24, equal on all devices."""
    return (random_words(keys, stream, count) >> 8).to(torch.float32) * 2.0**-24


def randint(keys: Keys, stream: str, count: int, high: int) -> Tensor:
    """`count` integers uniform on 0 .. high - 1 (high <= 2^31) for every sample: [B, count] int64."""
    return (random_words(keys, stream, count) * high) >> 32


ROUNDS = 12
"""Of `permute`'s network. In datasets of 3 to 64 samples, where two neighbours go is uneven beyond doubt (chi-square)
with 4 to 8 rounds, no longer with 10."""


def permute(position: Tensor, size: int, seed: int, epoch: int | Tensor, stream: str = "order") -> Tensor:
    """Where a keyed pseudo-random permutation of 0 .. size - 1 sends each `position`, in O(1) memory and time.

    A Feistel network on the digits (left, right) of a number in a mixed base, rows x columns >= size with hardly a
    place to spare: round by round, one digit is shifted by a keyed function of the other. Values outside the range are
    sent through again (cycle walking), which keeps it a bijection. position [M] int64 -> [M] int64; every epoch
    (one for all, or [M] int64) and every stream has a permutation of its own.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    value = position.clone()
    epochs = torch.as_tensor(epoch, device=value.device).expand_as(value)
    outside = torch.ones_like(value, dtype=torch.bool)
    while bool(outside.any()):
        left, right = value[outside] // columns, value[outside] % columns
        for number in range(ROUNDS):
            digit, base = (right, rows) if number % 2 == 0 else (left, columns)
            shift = randint(Keys(seed, epochs[outside], digit), f"{stream}.{number}", 1, base)[:, 0]
            if number % 2 == 0:
                left = (left + shift) % rows
            else:
                right = (right + shift) % columns
        value[outside] = left * columns + right
        outside = value >= size
    return value
