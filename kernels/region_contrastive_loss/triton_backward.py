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
    offset_ptr,  # [4] fp32: added to them, and what is added where peaks are apart
    apart_ptr,  # [1] int32: whether rows and columns have a peak each
    row_inverses_ptr,  # [3, M] fp32: by the shift, by a peak of its own, and that peak
    column_inverses_ptr,  # [3, N] fp32
    weights_ptr,  # [panel, columns]
    first_row,
    rows,
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
    FP32: tl.constexpr,
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
        FP32,
    )
    apart = tl.load(apart_ptr)
    logits, rest = _logits(logits, rate_ptr, offset_ptr + 2 * apart, FP32)
    if SIGMOID:
        _, weights = _sigmoid(logits, rest, FP32)
    else:
        row_facts, column_facts = row_inverses_ptr + row + i, column_inverses_ptr + column + j
        if apart == 0:
            inverses = tl.load(row_facts)[:, None] + tl.load(column_facts)[None, :]
            weights = _power(logits, rest, FP32) * inverses
        else:
            peak, inverse = tl.load(row_facts + 2 * rows), tl.load(row_facts + rows)
            weights = _power(logits - peak[:, None], rest, FP32) * inverse[:, None]
            peak, inverse = tl.load(column_facts + 2 * columns), tl.load(column_facts + columns)
            weights += _power(logits - peak[None, :], rest, FP32) * inverse[None, :]
    weights = _select(weights * UNIT, 0.0, facts, row, column, OWN, HAS_BITS, BLOCK_M, BLOCK_N)
    place = (panel_row + i).to(tl.int64)[:, None] * columns + (column + j)[None, :]
    tl.store(weights_ptr + place, weights.to(weights_ptr.dtype.element_ty))
