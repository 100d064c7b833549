"""Which pairs of a tile count nowhere, as bits."""

import triton
import triton.language as tl

from .triton_tile import _cosines, _place


@triton.jit
def _filter_kernel(
    captions,  # descriptor of [M, WIDTH]
    texts,  # descriptor of [N, WIDTH]
    row_valid_ptr,  # [M] uint8
    column_valid_ptr,  # [N] uint8
    dropped_ptr,  # [panel, columns / 32] int32
    threshold,
    first_row,
    columns,
    OWN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP32: tl.constexpr,
    GROUP: tl.constexpr,
):
    """SYMMETRIC: captions and texts are the same, and a tile above the diagonal also writes its mirror image."""
    panel_row, column = _place(columns, BLOCK_M, BLOCK_N, GROUP)
    row = first_row + panel_row
    if SYMMETRIC and column + BLOCK_N <= row:
        return
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_valid, column_valid = tl.load(row_valid_ptr + row + i), tl.load(column_valid_ptr + column + j)
    similarity = _cosines(
        captions,
        texts,
        dropped_ptr,
        panel_row,
        row,
        column,
        columns,
        False,
        WIDTH,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        FP32,
    )
    dropped = (similarity > threshold) | (row_valid == 0)[:, None] | (column_valid == 0)[None, :]
    if OWN:
        dropped = dropped | ((row + i)[:, None] == (column + j)[None, :])
    bits = dropped.to(tl.int32)
    word, mirrored = tl.arange(0, BLOCK_N // 32), tl.arange(0, BLOCK_M // 32)
    place = (panel_row + i).to(tl.int64)[:, None] * (columns // 32) + column // 32 + word[None, :]
    # Of the mirror image: rows are columns.
    mirror = (column + j).to(tl.int64)[None, :] * (columns // 32) + row // 32 + mirrored[:, None]
    if tl.max(tl.max(bits, 1), 0) == 0:  # as in most tiles: packing costs a tenth of the whole kernel
        tl.store(dropped_ptr + place, tl.zeros((BLOCK_M, BLOCK_N // 32), tl.int32))
        if SYMMETRIC:
            tl.store(dropped_ptr + mirror, tl.zeros((BLOCK_M // 32, BLOCK_N), tl.int32))
    else:
        bit = tl.arange(0, 32)
        words = tl.sum(tl.reshape(bits, (BLOCK_M, BLOCK_N // 32, 32)) << bit[None, None, :], 2)
        tl.store(dropped_ptr + place, words)
        if SYMMETRIC:
            words = tl.sum(tl.reshape(bits, (BLOCK_M // 32, 32, BLOCK_N)) << bit[None, :, None], 1)
            tl.store(dropped_ptr + mirror, words)
