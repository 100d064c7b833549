"""Which patches are visible: masks of any count (Locality Alignment, section 4.2) and of an exact one (UTA, LUT).

Every function returns `visible` [B, N] bool, True = kept, a pure function of the keys, drawn on their device: the same
bits on every device, in every batch.
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
TRIES = 24
"""Rectangles that `grow_blocks` tries. 5 to 8 suffice where all fit; more would only cost launches."""


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


def grow_blocks(keys: Keys, grid: tuple[int, int], count: int) -> Tensor:
    """BEiT's block-wise masks: rectangles that cover exactly `count` patches, here True.

    A rectangle is taken where it covers something new, and no more than is still to cover; what TRIES rectangles leave
    over is covered patch by patch, uniformly. Such masks cover the centre of an image far more often than its rim
    (UTA, section 2.2 and figure 3).
    """
    rows, columns = grid
    device = keys.index.device
    u = uniform(keys, "visible.grow", 4 * TRIES).view(-1, TRIES, 4).double()  # fp64: as in `blocks`
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    covered = torch.zeros(len(keys), rows * columns, dtype=torch.bool, device=device)
    for area_u, aspect_u, top_u, left_u in (draw.unbind(1) for draw in u.unbind(1)):
        missing = count - covered.sum(1)
        smallest = missing.clamp(max=min(SMALLEST_BLOCK, count / 2))
        area = smallest + area_u * (missing - smallest)
        aspect = LEAST_ASPECT * torch.exp(aspect_u * math.log(LARGEST_ASPECT / LEAST_ASPECT))
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top, left = (top_u * (rows - height + 1)).floor(), (left_u * (columns - width + 1)).floor()
        in_rows = (row >= top[:, None]) & (row < (top + height)[:, None])
        in_columns = (column >= left[:, None]) & (column < (left + width)[:, None])
        rectangle = (in_rows[:, :, None] & in_columns[:, None, :]).flatten(1)
        fits = (height <= rows) & (width <= columns) & ((rectangle & ~covered).sum(1) <= missing)
        covered = covered | (rectangle & fits[:, None])
    return exactly(keys, covered, count)


def exactly(keys: Keys, visible: Tensor, count: int) -> Tensor:
    """Hide or reveal patches of `visible` [B, N], uniformly at random, until every sample has `count` of them."""
    order = (uniform(keys, "visible.exactly", visible.shape[1]) + ~visible).argsort(dim=1, stable=True)
    return torch.zeros_like(visible).scatter(1, order[:, :count], True)


def exact(keys: Keys, grid: tuple[int, int], count: int, kind: str) -> Tensor:
    """Masks with exactly `count` visible patches in every sample.

    random: a uniform subset, as in MAE. block: BEiT's rectangles are hidden. reversed_block: rectangles over half of
    the image are hidden or, with probability 0.5, all but them are; then patches are hidden or revealed uniformly until
    the count is right. Each place is hidden with the same probability then, at any count: half of the rectangles' odds
    and half of the others' make one half, and the last step treats all alike. (Growing the reversed rectangles to the
    complement of the count instead would not be flat.) An odd number of patches has no half, and the last step changes
    more of one side than of the other; the probability of reversal, (N - 1) / 2N or (N + 1) / 2N, makes up for it. UTA,
    section 2.2 and table 8.
    """
    patches = grid[0] * grid[1]
    if kind == "random":
        return exactly(keys, torch.ones(len(keys), patches, dtype=torch.bool, device=keys.index.device), count)
    if kind == "block":
        return ~grow_blocks(keys, grid, patches - count)
    half = patches // 2
    covered = grow_blocks(keys, grid, half)
    # what is visible at first has `half` patches or, reversed, the rest; the odds by which a place keeps its state in
    # the last step go with the number of those that may change, and these probabilities cancel them
    reverse = uniform(keys, "visible.reverse", 1) < (half if count > half else patches - half) / patches
    return exactly(keys, covered ^ reverse, count)


def indices(visible: Tensor, count: int) -> Tensor:
    """Where the `count` visible patches of every sample lie, in ascending order: [B, N] bool -> [B, count] int64."""
    return (~visible).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def with_views(visible: Tensor, complement: bool, all_visible: bool) -> Tensor:
    """Stack the mask, its complement and the unmasked view, in this order: [B, N] -> [B, V, N]."""
    views = [visible]
    if complement:
        views.append(~visible)
    if all_visible:
        views.append(torch.ones_like(visible))
    return torch.stack(views, dim=1)
