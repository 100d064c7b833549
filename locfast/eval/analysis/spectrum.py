"""How features spread: singular values of their covariance over images (LUT, figure 4b)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Covariance:
    """The covariance [C, C] of rows that come in batches: fp64 sums, whatever the features' dtype.

    The paper's matrix is the other product, images x images (50,000 x 50,000). Both have the same singular values but
    for zeros, and this one needs C x C numbers whatever the number of images.
    """

    def __init__(self) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self.total: Tensor
        self.products: Tensor

    def add(self, rows: Tensor) -> None:
        """rows [B, C]."""
        if not len(rows):
            return
        rows = rows.double()
        if self.shift is None:
            # About the first batch's mean: features far from zero would lose their small directions to cancellation.
            self.shift = rows.mean(0)
            self.total, self.products = torch.zeros_like(self.shift), rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self.shift
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def matrix(self) -> Tensor:
        """Divided by the count less one, as `torch.cov`; at least two rows."""
        return (self.products - torch.outer(self.total, self.total) / self.count) / (self.count - 1)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a covariance."""

    values: Tensor  # [R] fp64, falling; R at most C and the number of images less one, what lies within rounding cut
    effective_rank: float
    """exp of the entropy of the values divided by their sum (Roy and Vetterli, 2007): 1 .. R."""


def spectrum(covariance: Covariance) -> Spectrum:
    """The singular values, which are the eigenvalues: the matrix is symmetric and has none below zero."""
    matrix = covariance.matrix()
    values = torch.linalg.eigvalsh(matrix).flip(0)[: covariance.count - 1]
    # Zeros come out as rounding, of either sign, of up to about C units in the largest value's last place.
    values = values[values > values[0] * len(matrix) * torch.finfo(torch.float64).eps]
    share = values / values.sum()
    rank = (-(share * share.log()).sum()).exp().item() if len(values) else 0.0
    return Spectrum(values, rank)


def log10_difference(one: Spectrum, other: Spectrum) -> Tensor:
    """log10 of the values of `one` less those of `other`, at the ranks that both have (figure 4b)."""
    shared = min(len(one.values), len(other.values))
    return one.values[:shared].log10() - other.values[:shared].log10()
