"""Tiles of pairs: which are dropped, their sums by row and by column, their weights in the backward.

A tile of R x R numbers lives in registers. What leaves it is a bit for a pair, two sums, or the weights of a panel of
rows, which the products of the backward read. No float atomics: every sum has one order.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""Peak of a sum without terms: not -inf, whose difference with itself is NaN."""


@triton.jit
def _cosines(
    a,  # descriptor of [M, WIDTH]
    b,  # descriptor of [N, WIDTH]
    cosines_ptr,  # [panel, columns] fp32
    panel_row,
    row,
    column,
    columns,
    FROM_CUBLAS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of a b^T in fp32, or of the panel that cuBLAS made of it.

    The order of a sum depends on BLOCK_K alone: a pair has the same cosine in every tile, and as its mirror image.
    """
    if FROM_CUBLAS:
        i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        total = tl.load(cosines_ptr + (panel_row + i).to(tl.int64)[:, None] * columns + (column + j)[None, :])
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            part = b.load([column, start])
            total = tl.dot(a.load([row, start]), part.T, total, input_precision=PRECISION)
    return total


@triton.jit
def _facts(
    dropped_ptr,  # [panel, columns / 32] int32
    row_valid_ptr,
    column_valid_ptr,
    panel_row,
    row,
    column,
    columns,
    HAS_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What tells which pairs of a tile count, loaded before its products are made: words of bits, or valid rows."""
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if HAS_BITS:
        word = column // 32 + tl.arange(0, BLOCK_N // 32)
        words = tl.load(dropped_ptr + (panel_row + i).to(tl.int64)[:, None] * (columns // 32) + word[None, :])
        return words, words
    else:
        return tl.load(row_valid_ptr + row + i), tl.load(column_valid_ptr + column + j)


@triton.jit
def _select(
    values,
    nothing,
    facts,
    row,
    column,
    OWN: tl.constexpr,
    HAS_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`nothing` in place of pairs that do not count. Most tiles have none of these, and skip the selection."""
    first, second = facts
    if HAS_BITS:  # its condition is for the GPU to decide
        if tl.max(tl.max((first != 0).to(tl.int32), 1), 0) != 0:
            bits = (first[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            values = tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0, nothing, values)
    else:
        crosses = OWN and (row < column + BLOCK_N) and (column < row + BLOCK_M)
        if crosses or tl.min(first, 0) == 0 or tl.min(second, 0) == 0:
            counts = (first != 0)[:, None] & (second != 0)[None, :]
            if OWN:
                i, j = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
                counts = counts & (i[:, None] != j[None, :])
            values = tl.where(counts, values, nothing)
    return values


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
    PRECISION: tl.constexpr,
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
        PRECISION,
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


@triton.jit
def _place(columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a program's tile: GROUP tiles below each other, then the next column of tiles.

    So programs that run at one time share their operands in the L2 cache. The grid holds whole groups of rows.
    """
    tiles = columns // BLOCK_N
    group, rest = tl.program_id(0) // (GROUP * tiles), tl.program_id(0) % (GROUP * tiles)
    height = tl.minimum(tl.num_programs(0) // tiles - group * GROUP, GROUP)
    return (group * GROUP + rest % height) * BLOCK_M, (rest // height) * BLOCK_N


@triton.jit
def _forward_kernel(
    regions,  # descriptor of [M, WIDTH]
    texts,  # descriptor of [N, WIDTH]
    cosines_ptr,  # [panel, columns] fp32
    dropped_ptr,  # [panel, columns / 32] int32
    row_valid_ptr,  # [M] uint8
    column_valid_ptr,  # [N] uint8
    rate_ptr,  # [1] fp32
    offset_ptr,  # [1] fp32: added to the logits in powers of two
    wanted_ptr,  # [1] int32: 0 where nothing is to be done
    row_peak_ptr,  # [segments, panel] fp32
    row_total_ptr,  # [segments, panel] fp32
    column_peak_ptr,  # [programs, columns] fp32
    column_total_ptr,  # [programs, columns] fp32
    first_row,
    panel,
    columns,
    segments,
    FORM: tl.constexpr,
    OWN: tl.constexpr,
    HAS_BITS: tl.constexpr,
    FROM_CUBLAS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of 2^logit by row and by column. A program walks over some columns of a block of rows, then of another.

    FORM: "shifted", the logits are below 2^127 by their offset; "online", whatever they are; "sigmoid", sums by row of
    log2(1 + 2^logit) and, in place of peaks, of its derivative. Column sums lie in memory, each program's apart.
    """
    if FORM == "online" and tl.load(wanted_ptr) == 0:
        return
    rate, offset = tl.load(rate_ptr), tl.load(offset_ptr)
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    blocks = panel // BLOCK_M
    length = tl.cdiv(columns // BLOCK_N, segments) * BLOCK_N
    program = tl.program_id(0)
    for item in range(program, blocks * segments, tl.num_programs(0)):
        panel_row, segment = (item % blocks) * BLOCK_M, item // blocks
        row = first_row + panel_row
        row_total = tl.zeros((BLOCK_M,), tl.float32)
        row_peak = tl.zeros((BLOCK_M,), tl.float32)
        if FORM == "online":
            row_peak += LOWEST
        for column in range(segment * length, tl.minimum((segment + 1) * length, columns), BLOCK_N):
            facts = _facts(
                dropped_ptr,
                row_valid_ptr,
                column_valid_ptr,
                panel_row,
                row,
                column,
                columns,
                HAS_BITS,
                BLOCK_M,
                BLOCK_N,
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
            )
            logits = logits * rate + offset
            logits = _select(logits, -float("inf"), facts, row, column, OWN, HAS_BITS, BLOCK_M, BLOCK_N)
            place = program.to(tl.int64) * columns + column + j
            if FORM == "sigmoid":
                small = tl.exp2(-tl.abs(logits))
                row_total += tl.sum(tl.maximum(logits, 0.0) + _log2_of_one_and(small), 1)
                row_peak += tl.sum(tl.where(logits < 0, small, 1.0) / (1.0 + small), 1)
            elif FORM == "online":
                peak = tl.maximum(row_peak, tl.max(logits, 1))
                row_total = row_total * tl.exp2(row_peak - peak) + tl.sum(tl.exp2(logits - peak[:, None]), 1)
                row_peak = peak
                tl.debug_barrier()
                before = tl.load(column_peak_ptr + place)
                total = tl.load(column_total_ptr + place)
                peak = tl.maximum(before, tl.max(logits, 0))
                total = total * tl.exp2(before - peak) + tl.sum(tl.exp2(logits - peak[None, :]), 0)
                tl.store(column_peak_ptr + place, peak)
                tl.store(column_total_ptr + place, total)
            else:
                terms = tl.exp2(logits)
                row_total += tl.sum(terms, 1)
                # A column's number may be one thread's to write and another's to read.
                tl.debug_barrier()
                total = tl.load(column_total_ptr + place) + tl.sum(terms, 0)
                tl.store(column_total_ptr + place, total)
        place = segment * panel + panel_row + i
        tl.store(row_total_ptr + place, row_total)
        if FORM != "shifted":
            tl.store(row_peak_ptr + place, row_peak)


@triton.jit
def _log2_of_one_and(x):
    """log2(1 + x) for x in 0..1, to the last digits where 1 + x has lost them."""
    rounded = 1.0 + x
    kept = rounded - 1.0
    return tl.where(kept == 0, x * 1.4426950408889634, tl.log2(rounded) * (x / tl.where(kept == 0, 1.0, kept)))


@triton.jit
def _backward_kernel(
    regions,  # descriptor of [M, WIDTH]
    texts,  # descriptor of [N, WIDTH]
    cosines_ptr,  # [panel, columns] fp32
    dropped_ptr,  # [panel, columns / 32] int32
    row_valid_ptr,  # [M] uint8
    column_valid_ptr,  # [N] uint8
    rate_ptr,  # [1] fp32
    offset_ptr,  # [1] fp32
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
    )
    logits = logits * tl.load(rate_ptr) + tl.load(offset_ptr)
    if SIGMOID:
        small = tl.exp2(-tl.abs(logits))
        weights = tl.where(logits < 0, small, 1.0) / (1.0 + small)
    else:
        row_inverse, column_inverse = tl.load(row_inverse_ptr + row + i), tl.load(column_inverse_ptr + column + j)
        if tl.load(apart_ptr) == 0:
            weights = tl.exp2(logits) * (row_inverse[:, None] + column_inverse[None, :])
        else:
            row_peak, column_peak = tl.load(row_peak_ptr + row + i), tl.load(column_peak_ptr + column + j)
            weights = tl.exp2(logits - row_peak[:, None]) * row_inverse[:, None]
            weights += tl.exp2(logits - column_peak[None, :]) * column_inverse[None, :]
    weights = _select(weights * UNIT, 0.0, facts, row, column, OWN, HAS_BITS, BLOCK_M, BLOCK_N)
    place = (panel_row + i).to(tl.int64)[:, None] * columns + (column + j)[None, :]
    tl.store(weights_ptr + place, weights.to(weights_ptr.dtype.element_ty))
