"""Which patches are visible: the mask distributions of the paper's section 4.2, drawn on the device from keys.

Every function returns `visible` [B, N] bool, True = kept, a pure function of the keys: the same bits on every device,
in every batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from locfast.random import Keys, randint, uniform

# BEiT's rectangles: area at least 16 patches, aspect log-uniform between these (BEiT; the paper's section B.1).
SMALLEST_BLOCK = 16
LEAST_ASPECT, LARGEST_ASPECT = 0.3, 1 / 0.3
MOST_BLOCKS = 64


def uniform_count(keys: Keys, patches: int) -> Tensor:
    """The number of visible patches is uniform on 0..N, ends included, and the patches are a uniform subset.

    A patch is visible when its uniform number exceeds a common threshold, itself uniform: N + 1 exchangeable numbers,
    so the threshold's rank, and with it the count, is uniform.
    """
    u = uniform(keys, "visible.uniform", patches + 1)
    return u[:, 1:] > u[:, :1]


def bernoulli(keys: Keys, patches: int, visible_fraction: float) -> Tensor:
    """Every patch is visible with the same probability, independently."""
    return uniform(keys, "visible.bernoulli", patches) < visible_fraction


def blocks(keys: Keys, grid: tuple[int, int], fraction: float) -> Tensor:
    """Random rectangles are uncovered until at least `fraction` of the grid is visible; never all, never nothing."""
    rows, columns = grid
    patches = rows * columns
    device = keys.index.device
    # fp64: devices differ in the last bit of exp and sqrt, which in fp32 would now and then round to another rectangle.
    u = uniform(keys, "visible.block", 4 * MOST_BLOCKS).view(-1, MOST_BLOCKS, 4).double()
    smallest = min(SMALLEST_BLOCK, fraction * patches / 2)
    area = smallest + u[..., 0] * (fraction * patches - smallest)
    aspect = LEAST_ASPECT * torch.exp(u[..., 1] * math.log(LARGEST_ASPECT / LEAST_ASPECT))
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top = (u[..., 2] * (rows - height + 1)).floor()
    left = (u[..., 3] * (columns - width + 1)).floor()

    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    in_rows = (row >= top[..., None]) & (row < (top + height)[..., None])
    in_columns = (column >= left[..., None]) & (column < (left + width)[..., None])
    rectangles = (in_rows[..., :, None] & in_columns[..., None, :]).flatten(2)

    visible = torch.zeros(len(keys), patches, dtype=torch.bool, device=device)
    for block in range(MOST_BLOCKS):
        unfinished = visible.sum(1, keepdim=True) < fraction * patches
        visible = visible | (rectangles[:, block] & unfinished)
    places = torch.arange(patches, device=device)
    spare = randint(keys, "visible.spare", 1, patches) == places  # one_hot would look at values, and wait for them
    return visible & ~(visible.all(1, keepdim=True) & spare)


def with_views(visible: Tensor, complement: bool, all_visible: bool) -> Tensor:
    """Stack the mask, its complement and the unmasked view, in this order: [B, N] -> [B, V, N]."""
    views = [visible]
    if complement:
        views.append(~visible)
    if all_visible:
        views.append(torch.ones_like(visible))
    return torch.stack(views, dim=1)
