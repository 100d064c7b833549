"""What is done row by row before and after the pairs: each row crosses memory once."""

import triton
import triton.language as tl


@triton.jit
def _unit_rows(x_ptr, units_ptr, inverse_ptr, row, valid, E: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write unit rows, zero beyond E, and their inverse norms."""
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row[:, None] * E + k[None, :], mask=(k < E)[None, :] & valid[:, None], other=0.0)
    x = x.to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    inverse = tl.div_rn(1.0, tl.where(norm < 1e-12, 1e-12, norm))  # and a NaN stays one
    unit = (x * inverse[:, None]).to(units_ptr.dtype.element_ty)
    tl.store(units_ptr + row[:, None] * WIDTH + k[None, :], unit, mask=(k < WIDTH)[None, :])
    tl.store(inverse_ptr + row, inverse)


@triton.jit
def _prepare_kernel(
    regions_ptr,  # [rows, E]
    texts_ptr,  # [rows, E]
    valid_ptr,  # [rows] uint8
    region_units_ptr,  # [padded, WIDTH]
    text_units_ptr,  # [padded, WIDTH]
    inverse_ptr,  # [2, padded] fp32
    padded_valid_ptr,  # [padded] uint8
    rows,
    padded,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = tl.load(valid_ptr + row, mask=row < rows, other=0)
    _unit_rows(regions_ptr, region_units_ptr, inverse_ptr, row, valid != 0, E, WIDTH, BLOCK)
    _unit_rows(texts_ptr, text_units_ptr, inverse_ptr + padded, row, valid != 0, E, WIDTH, BLOCK)
    tl.store(padded_valid_ptr + row, valid)


@triton.jit
def _finish_kernel(
    x_ptr,  # [rows, E]
    valid_ptr,  # [padded] uint8
    grad_ptr,  # [padded, WIDTH] fp32, of the unit rows, without that of the positives
    inverse_ptr,  # [padded] fp32
    slope_ptr,  # [padded] fp32
    partner_ptr,  # [padded, WIDTH]
    factor_ptr,  # [1] fp32
    x_grad_ptr,  # [rows, E]
    along_ptr,  # [rows] fp32
    rows,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    exists = row < rows
    inside = exists[:, None] & (k < E)[None, :]
    valid = tl.load(valid_ptr + row, mask=exists, other=0) != 0
    inverse = tl.load(inverse_ptr + row)
    place = row[:, None] * WIDTH + k[None, :]
    partner = tl.load(partner_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0) + tl.load(slope_ptr + row)[:, None] * partner
    place = row[:, None] * E + k[None, :]
    x = tl.load(x_ptr + place, mask=inside & valid[:, None], other=0.0).to(tl.float32)
    unit = x * inverse[:, None]
    along = tl.sum(unit * grad, 1)
    tl.store(along_ptr + row, along, mask=exists)
    across = tl.where(inverse < 1e12, along, 0.0)  # a norm that is clamped does not change with x
    result = (grad - unit * across[:, None]) * (tl.load(factor_ptr) * inverse)[:, None]
    tl.store(x_grad_ptr + place, result.to(x_grad_ptr.dtype.element_ty), mask=inside)
