"""Which captions are nearly the same text: the same answer for a pair wherever it is asked, kept as one bit a pair."""

import torch
from torch import Tensor

from .products import product

WORD = 32
"""Pairs to a word."""


def exceeds(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """a [M, E], b [N, E] of unit rows (or of zeros)  ->  [M, N]: whether a cosine is strictly above the threshold.

    A library's matrix product sums in an order that depends on its shape, so that ranks and panels could disagree on a
    pair that sits on the threshold. Pairs nearer to it than two orders can differ are summed again, in a fixed order.
    (Triton's tiles have an order of their own, which is fixed too.)
    """
    similarity = product(a, b.T)
    above = similarity > threshold
    # |error| <= E * 2^-24 * sum |a_k b_k| for any order of E sums in fp32, and the sum is at most 1 for unit rows.
    near = similarity.sub_(threshold).abs_() <= 2 * a.shape[1] * torch.finfo(similarity.dtype).eps
    if a.device.type != "meta":
        for rows, columns in _in_parts(near.nonzero(), a.shape[1]):
            above[rows, columns] = in_fixed_order(a[rows], b[columns], similarity.dtype) > threshold
    return above


def in_fixed_order(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Row by row a . b in `dtype`: halves added to halves, an order that depends on the width alone."""
    terms = a.to(dtype) * b.to(dtype)
    terms = torch.nn.functional.pad(terms, (0, (1 << max(0, a.shape[1] - 1).bit_length()) - a.shape[1]))
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    return terms[:, 0]


def _in_parts(pairs: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of pairs, so many at a time that their products stay small: all may sit on the threshold."""
    return [(part[:, 0], part[:, 1]) for part in pairs.split(max(1, (1 << 22) // width))] if len(pairs) else []


def pack(flags: Tensor) -> Tensor:
    """flags [M, N] bool  ->  words [M, ceil(N / 32)] int32, the pair of column 32 w + b in bit b of word w."""
    flags = torch.nn.functional.pad(flags, (0, -flags.shape[1] % WORD)).unflatten(1, (-1, WORD))
    bits = torch.arange(WORD, dtype=torch.int32, device=flags.device)
    return (flags.to(torch.int32) << bits).sum(-1, dtype=torch.int32)


def unpack(words: Tensor, columns: int) -> Tensor:
    """The flags [M, columns] of packed words."""
    bits = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> bits) & 1).bool().flatten(1)[:, :columns]
