"""Sums over the pairs that count, by row and by column. A tile of logits lives in registers.

No float atomics: every sum has one order.
"""

import triton
import triton.language as tl

from .triton_tile import _cosines, _facts, _logits, _power, _select, _sigmoid

LOWEST = tl.constexpr(-1e30)
"""Peak of a sum without terms: not -inf, whose difference with itself is NaN."""


@triton.jit
def _positives_kernel(
    regions,  # descriptor of [M, WIDTH]
    texts,  # descriptor of [M, WIDTH]
    cosine_ptr,  # [M] fp32
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP32: tl.constexpr,
):
    """Cosines of the positives, by the products and in the order of all others.

    Where embeddings are much alike, so are the roundings of their cosines, which then cancel in the loss.
    """
    row, i = tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    cosines = _cosines(regions, texts, cosine_ptr, row, row, row, BLOCK, False, WIDTH, BLOCK, BLOCK, BLOCK_K, FP32)
    tl.store(cosine_ptr + row + i, tl.sum(tl.where(i[:, None] == i[None, :], cosines, 0.0), 1))


@triton.jit
def _forward_kernel(
    regions,  # descriptor of [M, WIDTH]
    texts,  # descriptor of [N, WIDTH]
    cosines_ptr,  # [panel, columns] fp32
    dropped_ptr,  # [panel, columns / 32] int32
    row_valid_ptr,  # [M] uint8
    column_valid_ptr,  # [N] uint8
    rate_ptr,  # [2] fp32: logits per cosine, in powers of two
    offset_ptr,  # [2] fp32: added to them
    wanted_ptr,  # [1] int32: 0 where nothing is to be done
    row_peak_ptr,  # [segments, rows] fp32
    row_total_ptr,  # [segments, rows] fp32
    column_peak_ptr,  # [programs, columns] fp32
    column_total_ptr,  # [programs, columns] fp32
    first_row,
    panel,
    rows,
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
    FP32: tl.constexpr,
):
    """Sums of 2^logit by row and by column. A program walks over some columns of a block of rows, then of another.

    FORM: "shifted", the logits are below 2^127 by their offset; "online", whatever they are; "sigmoid", sums by row of
    log2(1 + 2^logit) and, in place of peaks, of its derivative. Column sums lie in memory, each program's apart.
    """
    if FORM == "online" and tl.load(wanted_ptr) == 0:
        return
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    blocks = panel // BLOCK_M
    length = tl.cdiv(columns // BLOCK_N, segments) * BLOCK_N
    program = tl.program_id(0)
    if FORM != "sigmoid" and first_row == 0:  # later panels add to what this one leaves
        for column in range(0, columns, BLOCK_N):
            place = program.to(tl.int64) * columns + column + j
            tl.store(column_total_ptr + place, tl.zeros((BLOCK_N,), tl.float32))
            if FORM == "online":
                tl.store(column_peak_ptr + place, tl.zeros((BLOCK_N,), tl.float32) + LOWEST)
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
                FP32,
            )
            logits, rest = _logits(logits, rate_ptr, offset_ptr, FP32)
            logits = _select(logits, -float("inf"), facts, row, column, OWN, HAS_BITS, BLOCK_M, BLOCK_N)
            place = program.to(tl.int64) * columns + column + j
            if FORM == "sigmoid":
                losses, slopes = _sigmoid(logits, rest, FP32)
                row_total += tl.sum(losses, 1)
                row_peak += tl.sum(slopes, 1)
            elif FORM == "online":
                peak = tl.maximum(row_peak, tl.max(logits, 1))
                row_total = row_total * tl.exp2(row_peak - peak) + tl.sum(_power(logits - peak[:, None], rest, FP32), 1)
                row_peak = peak
                tl.debug_barrier()
                before = tl.load(column_peak_ptr + place)
                total = tl.load(column_total_ptr + place)
                peak = tl.maximum(before, tl.max(logits, 0))
                total = total * tl.exp2(before - peak) + tl.sum(_power(logits - peak[None, :], rest, FP32), 0)
                tl.store(column_peak_ptr + place, peak)
                tl.store(column_total_ptr + place, total)
            else:
                terms = _power(logits, rest, FP32)
                row_total += tl.sum(terms, 1)
                # A column's number may be one thread's to write and another's to read.
                tl.debug_barrier()
                total = tl.load(column_total_ptr + place) + tl.sum(terms, 0)
                tl.store(column_total_ptr + place, total)
        place = segment.to(tl.int64) * rows + row + i
        tl.store(row_total_ptr + place, row_total)
        if FORM != "shifted":
            tl.store(row_peak_ptr + place, row_peak)
