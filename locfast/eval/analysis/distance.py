"""How far attention reaches: the average attention distance (LUT, equation 4; from Dosovitskiy et al., 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reach(NamedTuple):
    """Of one layer, by image and head; each [B, H] fp64."""

    distance: Tensor
    """Mean over the N query patches i of sum_j S(i, j) |p_i - p_j|, j over the patches. Equation 4 as it is written
    sums over i too: N times this. What a query gives to prefix tokens has no place and counts as no distance."""
    among_patches: Tensor
    """The same with every row divided by what it gives to patches, so that it sums to one over them."""
    to_prefix: Tensor
    """Share of attention that patches give to prefix tokens (CLS, registers), mean over queries."""


def pairwise_distances(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Euclidean distances [N, N] fp64 between centres of patches, row by row, in an image of height and width 1."""
    rows, columns = ((torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n for n in grid)
    centres = torch.cartesian_prod(rows, columns).view(-1, 2)
    return (centres[:, None] - centres[None]).norm(dim=-1)


def reach(attention: Tensor, distances: Tensor) -> Reach:
    """attention [B, H, T, T], rows summing to one, distances [N, N]; the T - N first tokens are prefixes.

    Queries are patches. CLS's own row is left out, its column counts in `to_prefix` alone. Autocast rounds nothing
    here: distances in bf16 would move uniform attention over 14 x 14 patches by 0.2 %.
    """
    prefix = attention.shape[-1] - len(distances)
    patches = attention[:, :, prefix:, prefix:]
    with torch.autocast(attention.device.type, enabled=False):
        far = torch.einsum("bhij,ij->bhi", patches, distances.to(attention.dtype)).double()
    given = patches.sum(-1).double()
    # A query that looks at prefixes alone, to the last bit, reaches no patch: it counts as 0 here too.
    among = torch.where(given > 0, far / given.clamp(min=torch.finfo(torch.float32).tiny), 0)
    return Reach(far.mean(-1), among.mean(-1), 1 - given.mean(-1))
