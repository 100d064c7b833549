"""What the kernels over pairs do with a tile of them: its cosines, which of its pairs count, where it lies."""

import triton
import triton.language as tl


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
    FP32: tl.constexpr,
):
    """A tile of a b^T in fp32, or of the panel that cuBLAS made of it.

    The order of a sum depends on BLOCK_K alone: a pair has the same cosine in every tile, and as its mirror image.
    FP32, for fp32: sums of 2 BLOCK_K terms, and then of these. In one row 768 terms on the FMA units lose more than
    the tolerance has, at a scale of 100.
    """
    if FROM_CUBLAS:
        i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        total = tl.load(cosines_ptr + (panel_row + i).to(tl.int64)[:, None] * columns + (column + j)[None, :])
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if FP32:
            for start in range(0, WIDTH, 2 * BLOCK_K):
                part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for k in tl.static_range(0, 2 * BLOCK_K, BLOCK_K):
                    b_part = b.load([column, start + k])
                    part = tl.dot(a.load([row, start + k]), b_part.T, part, input_precision="ieee")
                total += part
        else:
            for start in range(0, WIDTH, BLOCK_K):
                b_part = b.load([column, start])
                total = tl.dot(a.load([row, start]), b_part.T, total, input_precision="ieee")
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
def _place(columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a program's tile: GROUP tiles below each other, then the next column of tiles.

    So programs that run at one time share their operands in the L2 cache. The grid holds whole groups of rows.
    """
    tiles = columns // BLOCK_N
    group, rest = tl.program_id(0) // (GROUP * tiles), tl.program_id(0) % (GROUP * tiles)
    height = tl.minimum(tl.num_programs(0) // tiles - group * GROUP, GROUP)
    return (group * GROUP + rest % height) * BLOCK_M, (rest // height) * BLOCK_N


@triton.jit
def _log2_of_one_and(x):
    """log2(1 + x) for x in 0..1, to the last digits where 1 + x has lost them."""
    rounded = 1.0 + x
    kept = rounded - 1.0
    return tl.where(kept == 0, x * 1.4426950408889634, tl.log2(rounded) * (x / tl.where(kept == 0, 1.0, kept)))


@triton.jit
def _logits(cosines, rate_ptr, offset_ptr, FP32: tl.constexpr):
    """In powers of two, and what their last digit lacks, in natural units.

    Rate and offset are sums of two numbers. FP32: without the second ones all logits would be stretched
    and moved alike, which no sum over pairs would average out; added to a rounded logit they would be lost again.
    """
    logits = cosines * tl.load(rate_ptr) + tl.load(offset_ptr)
    rest = logits
    if FP32:
        rest = (cosines * tl.load(rate_ptr + 1) + tl.load(offset_ptr + 1)) * 0.6931471805599453
    return logits, rest


@triton.jit
def _power(logits, rest, FP32: tl.constexpr):
    """2^logits e^rest, for a rest so small that 1 + rest is its power."""
    power = tl.exp2(logits)
    if FP32:
        power += power * rest
    return power


@triton.jit
def _sigmoid(logits, rest, FP32: tl.constexpr):
    """log2(1 + 2^logits), and its derivative by a logit in natural units, for logits of either sign."""
    toward_zero = rest
    if FP32:
        toward_zero = tl.where(logits < 0, rest, -rest)
    small = _power(-tl.abs(logits), toward_zero, FP32)
    loss = tl.maximum(logits, 0.0) + _log2_of_one_and(small)
    if FP32:
        loss += tl.where(logits < 0, 0.0, rest * 1.4426950408889634)
    return loss, tl.where(logits < 0, small, 1.0) / (1.0 + small)
