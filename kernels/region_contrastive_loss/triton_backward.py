"""Weights of the pairs of a panel of rows, which the products of the backward read."""

import triton
import triton.language as tl

from .triton_tile import _cosines, _facts, _logits, _place, _power, _select, _sigmoid


@triton.jit
def _backward_kernel(
    regions,  # descriptor of [M, WIDTH]
    texts,  # descriptor of [N, WIDTH]
    cosines_ptr,  # [panel, columns] fp32
    dropped_ptr,  # [panel, columns / 32] int32
    row_valid_ptr,  # [M] uint8
    column_valid_ptr,  # [N] uint8
    rate_ptr,  # [2] fp32: logits per cosine, in powers of two
    offset_ptr,  # [2] fp32: added to them
    apart_ptr,  # [1] int32: whether rows and columns have a peak each
    row_peak_ptr,  # [M] fp32
    row_inverse_ptr,  # [M] fp32
    column_peak_ptr,  # [N] fp32
    column_inverse_ptr,  # [N] fp32
    weights_ptr,  # [panel, columns]
    first_row,
    columns,
    UNIT: tl.constexpr,
    SIGMOID: tl.constexpr,
    OWN: tl.constexpr,
    HAS_BITS: tl.constexpr,
    FROM_CUBLAS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PRECISE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The weights of a panel of rows: derivatives of the losses of rows and columns with respect to the logits."""
    panel_row, column = _place(columns, BLOCK_M, BLOCK_N, GROUP)
    row = first_row + panel_row
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    facts = _facts(
        dropped_ptr, row_valid_ptr, column_valid_ptr, panel_row, row, column, columns, HAS_BITS, BLOCK_M, BLOCK_N
    )
    logits = _cosines(
        regions,
        texts,
        cosines_ptr,
        panel_row,
        row,
        column,
        columns,
        FROM_CUBLAS,
        WIDTH,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
        IN_PARTS,
    )
    logits, rest = _logits(logits, rate_ptr, offset_ptr, PRECISE)
    if SIGMOID:
        _, weights = _sigmoid(logits, rest, PRECISE)
    else:
        row_inverse, column_inverse = tl.load(row_inverse_ptr + row + i), tl.load(column_inverse_ptr + column + j)
        if tl.load(apart_ptr) == 0:
            weights = _power(logits, rest, PRECISE) * (row_inverse[:, None] + column_inverse[None, :])
        else:
            row_peak, column_peak = tl.load(row_peak_ptr + row + i), tl.load(column_peak_ptr + column + j)
            weights = _power(logits - row_peak[:, None], rest, PRECISE) * row_inverse[:, None]
            weights += _power(logits - column_peak[None, :], rest, PRECISE) * column_inverse[None, :]
    weights = _select(weights * UNIT, 0.0, facts, row, column, OWN, HAS_BITS, BLOCK_M, BLOCK_N)
    place = (panel_row + i).to(tl.int64)[:, None] * columns + (column + j)[None, :]
    tl.store(weights_ptr + place, weights.to(weights_ptr.dtype.element_ty))
