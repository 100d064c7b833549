"""From the pieces of sums that programs of the forward leave to logarithms, and from these to what weights need.

A block of rows or of columns to a program; both sides in one launch. Logarithms are fp64, in powers of two.
"""

import triton
import triton.language as tl

from .block import FAINT, FREE, SAFE

_FAINT, _FREE, _SAFE = tl.constexpr(FAINT), tl.constexpr(FREE), tl.constexpr(SAFE)


@triton.jit
def _highest(rate):
    """The highest logit there can be, in powers of two: rows of rounded units have cosines up to 1.005 in bf16."""
    return tl.abs(rate) * 1.015625


@triton.jit
def _shift(rate):
    """What stands for it, so that 2^(logit - shift) overflows for no cosine: a whole number, which fp32 holds."""
    return tl.ceil(tl.maximum(_highest(rate) - _FREE, 0.0))


@triton.jit
def _constants_kernel(
    rate_ptr,  # [1] fp64: logits per cosine, in powers of two
    bias_ptr,  # [1] fp64, in powers of two; anything where there is none
    constants_ptr,  # [8] fp32: rate, minus the shift, zero, bias, each as two numbers whose sum it is
):
    rate, bias = tl.load(rate_ptr), tl.load(bias_ptr)
    high = rate.to(tl.float32)
    tl.store(constants_ptr, high)
    tl.store(constants_ptr + 1, (rate - high.to(tl.float64)).to(tl.float32))
    tl.store(constants_ptr + 2, (-_shift(rate)).to(tl.float32))
    for zero in tl.static_range(3, 6):
        tl.store(constants_ptr + zero, 0.0)
    high = bias.to(tl.float32)
    tl.store(constants_ptr + 6, high)
    tl.store(constants_ptr + 7, (bias - high.to(tl.float64)).to(tl.float32))


@triton.jit
def _settle(parts_ptr, valid_ptr, total_ptr, place, length, parts, rate):
    """Add up the pieces of a block's sums; whether one is so small that its terms may have been flushed to zero."""
    part_ptr = parts_ptr + place
    total = tl.load(part_ptr)
    for _ in range(1, parts):
        part_ptr += length
        total += tl.load(part_ptr)
    tl.store(total_ptr + place, total)
    faint = (total < 2.0**_FAINT) & (tl.load(valid_ptr + place) != 0)
    return tl.where(_highest(rate) > _SAFE, tl.max(faint.to(tl.int32), 0), 0)


@triton.jit
def _settle_kernel(
    rate_ptr,  # [1] fp64
    row_parts_ptr,  # [segments, rows] fp32
    column_parts_ptr,  # [programs, columns] fp32
    row_valid_ptr,  # [rows] uint8
    column_valid_ptr,  # [columns] uint8
    row_total_ptr,  # [rows] fp32
    column_total_ptr,  # [columns] fp32
    again_ptr,  # [1] int32, zero before: whether the online form is wanted
    rows,
    columns,
    segments,
    programs,
    BLOCK: tl.constexpr,
):
    block, rate = tl.program_id(0), tl.load(rate_ptr)
    if block < rows // BLOCK:
        place = block * BLOCK + tl.arange(0, BLOCK)
        faint = _settle(row_parts_ptr, row_valid_ptr, row_total_ptr, place, rows, segments, rate)
    else:
        place = (block - rows // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        faint = _settle(column_parts_ptr, column_valid_ptr, column_total_ptr, place, columns, programs, rate)
    if faint != 0:
        tl.atomic_max(again_ptr, 1)


@triton.jit
def _log2(total_ptr, parts_ptr, peaks_ptr, log2_ptr, place, length, parts, again, shift):
    """log2 of the sums of a block: of the shifted form's totals, or of the online form's pieces."""
    if again == 0:
        tl.store(log2_ptr + place, tl.log2(tl.load(total_ptr + place).to(tl.float64)) + shift)
    else:
        part_ptr, peak_ptr = parts_ptr + place, peaks_ptr + place
        total, highest = tl.load(part_ptr), tl.load(peak_ptr)
        for _ in range(1, parts):
            part_ptr += length
            peak_ptr += length
            peak = tl.load(peak_ptr)
            higher = tl.maximum(highest, peak)
            total = total * tl.exp2(highest - higher) + tl.load(part_ptr) * tl.exp2(peak - higher)
            highest = higher
        tl.store(log2_ptr + place, tl.log2(total.to(tl.float64)) + highest.to(tl.float64))


@triton.jit
def _log2_kernel(
    rate_ptr,  # [1] fp64
    again_ptr,  # [1] int32
    row_total_ptr,  # [rows] fp32
    column_total_ptr,  # [columns] fp32
    row_parts_ptr,  # [segments, rows] fp32, of the online form, if it was wanted
    row_peaks_ptr,  # [segments, rows] fp32
    column_parts_ptr,  # [programs, columns] fp32
    column_peaks_ptr,  # [programs, columns] fp32
    row_log2_ptr,  # [rows] fp64
    column_log2_ptr,  # [columns] fp64
    rows,
    columns,
    segments,
    programs,
    BLOCK: tl.constexpr,
):
    block, again, shift = tl.program_id(0), tl.load(again_ptr), _shift(tl.load(rate_ptr))
    if block < rows // BLOCK:
        place = block * BLOCK + tl.arange(0, BLOCK)
        _log2(row_total_ptr, row_parts_ptr, row_peaks_ptr, row_log2_ptr, place, rows, segments, again, shift)
    else:
        place = (block - rows // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        parts_ptr, peaks_ptr = column_parts_ptr, column_peaks_ptr
        _log2(column_total_ptr, parts_ptr, peaks_ptr, column_log2_ptr, place, columns, programs, again, shift)


@triton.jit
def _inverse(log2_ptr, valid_ptr, inverses_ptr, place, length, shift):
    """Write 1 / sum as 2^-shift times a number, and as 2^-peak times another; whether the first one is too large."""
    log2 = tl.load(log2_ptr + place)
    peak = tl.floor(log2 + 0.5)
    inverse = tl.exp2((peak - log2).to(tl.float32))
    tl.store(inverses_ptr + place, inverse * tl.exp2((shift - peak).to(tl.float32)))  # a whole power: no digit is lost
    tl.store(inverses_ptr + length + place, inverse)
    tl.store(inverses_ptr + 2 * length + place, peak.to(tl.float32))
    return tl.max(((log2 < shift + _FAINT) & (tl.load(valid_ptr + place) != 0)).to(tl.int32), 0)


@triton.jit
def _inverse_kernel(
    rate_ptr,  # [1] fp64
    row_log2_ptr,  # [rows] fp64
    column_log2_ptr,  # [columns] fp64
    row_valid_ptr,  # [rows] uint8
    column_valid_ptr,  # [columns] uint8
    row_inverses_ptr,  # [3, rows] fp32: by the shift, by a peak of its own, and that peak
    column_inverses_ptr,  # [3, columns] fp32
    apart_ptr,  # [1] int32, zero before: whether rows and columns need peaks of their own
    rows,
    columns,
    BLOCK: tl.constexpr,
):
    block, rate = tl.program_id(0), tl.load(rate_ptr)
    shift = _shift(rate)
    if block < rows // BLOCK:
        place = block * BLOCK + tl.arange(0, BLOCK)
        faint = _inverse(row_log2_ptr, row_valid_ptr, row_inverses_ptr, place, rows, shift)
    else:
        place = (block - rows // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        faint = _inverse(column_log2_ptr, column_valid_ptr, column_inverses_ptr, place, columns, shift)
    if _highest(rate) > _SAFE and faint != 0:
        tl.atomic_max(apart_ptr, 1)
