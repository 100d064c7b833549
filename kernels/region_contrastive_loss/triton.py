"""The region losses in Triton: rows made ready, pairs in tiles, and cuBLAS for the two products of the backward.

The backward's weights exist for one panel of rows at a time, in the dtype of the products. A kernel that kept them in
registers would have to hold or to add up atomically the gradients of whole rows and columns, [128, 768] numbers each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .block import LOG2E, Block, padded, weight_unit
from .filter import WORD
from .products import product
from .tiles import FROM_CUBLAS, PANEL, Tiles, tiles
from .triton_backward import _backward_kernel
from .triton_constants import GROUP, SUMS, options, products, row_constants
from .triton_filter import _filter_kernel
from .triton_forward import _forward_kernel, _positives_kernel
from .triton_rows import _finish_kernel, _prepare_kernel
from .triton_sums import _constants_kernel, _inverse_kernel, _log2_kernel, _settle_kernel
from .triton_variants import variants

DIAGONAL = 64
"""Rows and columns of the tiles that hold the positives."""
MAX_SEGMENTS = 64
"""Into which the columns are cut, so that programs of the forward end at about one time."""


def prepare(
    regions: Tensor, texts: Tensor, valid: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As in tiled.py, with rows and widths filled up to whole tiles: units, inverse norms, cosines, valid."""
    regions, texts = regions.contiguous(), texts.contiguous()
    rows, width = padded(regions.shape, "triton")
    region_units, text_units = (torch.empty(rows, width, dtype=dtype, device=regions.device) for _ in range(2))
    inverse = torch.empty(2, rows, dtype=torch.float32, device=regions.device)
    cosines = torch.empty(rows, dtype=torch.float32, device=regions.device)
    padded_valid = torch.empty(rows, dtype=torch.bool, device=regions.device)
    constants = row_constants(regions.shape[1], width)
    _prepare_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
        *(regions, texts, _bytes(valid), region_units, text_units, inverse, _bytes(padded_valid)),
        *(len(regions), rows),
        **constants,
    )
    cut = replace(tiles("forward", dtype, regions.device), rows=DIAGONAL, columns=DIAGONAL, num_warps=4)
    sizes = {key: value for key, value in products(region_units, cut).items() if key not in ("BLOCK_M", "BLOCK_N")}
    units = _descriptors(region_units, text_units, cut)
    _positives_kernel[(rows // DIAGONAL,)](*units, cosines, BLOCK=DIAGONAL, **sizes, **options(cut))
    return region_units, text_units, inverse, cosines, padded_valid


def finish(
    x: Tensor, valid: Tensor, grad: Tensor, inverse: Tensor, slope: Tensor, partner: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """As in tiled.py."""
    x, grad = x.contiguous(), grad.contiguous()
    result, along = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
    constants = row_constants(x.shape[1], grad.shape[1])
    _finish_kernel[(triton.cdiv(len(x), constants["ROWS"]),)](
        *(x, _bytes(valid), grad, inverse, slope.float(), partner, factor, result, along, len(x)),
        **constants,
    )
    return result, along


def dropped_pairs(block: Block) -> Tensor:
    """As in tiled.py. Where both sides are the same captions, half of the tiles are computed."""
    return _dropped(block, slice(0, len(block.regions)), symmetric=block.own)


def negatives(block: Block) -> tuple[Tensor, Tensor]:
    """As in tiled.py. Where a sum is so small that its terms may have been flushed to zero, all is done once more.

    Whether it is wanted is known to the device alone: the second time is always launched, and returns at once.
    """
    device, rows, columns = block.regions.device, len(block.regions), len(block.texts)
    rate, constants = _constants_of(block)
    again = torch.zeros(1, dtype=torch.int32, device=device)
    by_row, by_column = _sums(block, "shifted", constants)
    totals = torch.empty(rows + columns, device=device).split([rows, columns])
    grid = ((rows + columns) // SUMS,)
    valid = _bytes(block.row_valid), _bytes(block.column_valid)
    sizes = rows, columns, by_row.shape[1], by_column.shape[1]
    _settle_kernel[grid](rate, by_row, by_column, *valid, *totals, again, *sizes, BLOCK=SUMS, num_warps=2)
    by_row, by_column = _sums(block, "online", constants, again)
    log2 = torch.empty(rows + columns, dtype=torch.float64, device=device).split([rows, columns])
    sizes = rows, columns, by_row.shape[1], by_column.shape[1]
    _log2_kernel[grid](rate, again, *totals, *by_row, *by_column, *log2, *sizes, BLOCK=SUMS, num_warps=2)
    return log2[0], log2[1]


def negatives_sigmoid(block: Block) -> tuple[Tensor, Tensor]:
    """As in tiled.py."""
    sums, _ = _sums(block, "sigmoid", _constants_of(block)[1])
    losses, slopes = sums.sum(1)
    return losses / LOG2E, slopes


def gradients(
    block: Block, row_log2: Tensor, column_log2: Tensor, regions_grad: Tensor | None, needs_texts: bool
) -> Tensor | None:
    """As in tiled.py."""
    dtype, device, sizes = block.regions.dtype, block.regions.device, (len(block.regions), len(block.texts))
    cut = tiles("backward", dtype, device)
    rate, constants = _constants_of(block)
    apart = torch.zeros(1, dtype=torch.int32, device=device)
    if block.bias is None:
        offset, inverses = constants[2:], [torch.empty(3, size, device=device) for size in sizes]
        valid = _bytes(block.row_valid), _bytes(block.column_valid)
        logarithms = row_log2.contiguous(), column_log2.contiguous()
        grid = (sum(sizes) // SUMS,)
        _inverse_kernel[grid](rate, *logarithms, *valid, *inverses, apart, *sizes, BLOCK=SUMS, num_warps=2)
    else:
        offset, inverses = constants[6:], [constants, constants]  # of which the latter are not read
    weights = torch.empty(min(PANEL["rows"], sizes[0]), sizes[1], dtype=dtype, device=device)
    texts_grad = None
    for rows in _panels(block):
        part = weights[: rows.stop - rows.start]
        _backward_kernel[(len(part) // cut.rows * (sizes[1] // cut.columns),)](
            *_operands(block, rows, cut),
            *(constants, offset, apart, *inverses, part, rows.start, *sizes),
            UNIT=weight_unit(dtype),
            SIGMOID=block.bias is not None,
            GROUP=GROUP,
            **_constants(block, cut),
            **options(cut),
        )
        if regions_grad is not None:
            product(part, block.texts, regions_grad[rows])
        if needs_texts:
            texts_grad = product(part.T, block.regions[rows], texts_grad)
    return texts_grad


def _constants_of(block: Block) -> tuple[Tensor, Tensor]:
    """Logits per cosine in powers of two, [] fp64; and with what goes with it as the kernels take it, [8] fp32."""
    rate, constants = block.scale * LOG2E, torch.empty(8, device=block.regions.device)
    bias = rate if block.bias is None else block.bias * LOG2E
    _constants_kernel[(1,)](rate, bias, constants, num_warps=1)
    return rate, constants


def _sums(block: Block, form: str, constants: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the forward kernel adds up: [kinds, segments, M] for rows and [kinds, programs, N] for columns.

    Kinds: totals, and of "online" peaks, of "sigmoid" slopes, which has no sums of columns.
    """
    device, columns = block.regions.device, len(block.texts)
    cut = tiles("forward" if form == "shifted" else form, block.regions.dtype, device)
    offset = constants[{"shifted": 2, "online": 4, "sigmoid": 6}[form] :]
    programs = cut.programs * _multiprocessors(device)
    decided = block.threshold is None or block.dropped is not None
    panels = list(_panels(block, whole=decided and cut != FROM_CUBLAS))
    segments = _segments((panels[0].stop - panels[0].start) // cut.rows, columns // cut.columns, programs)
    by_row = torch.empty(1 if form == "shifted" else 2, segments, len(block.regions), device=device)
    by_column = torch.empty({"shifted": 1, "online": 2, "sigmoid": 0}[form], programs, columns, device=device)
    for rows in panels:
        _forward_kernel[(programs,)](
            *_operands(block, rows, cut),
            *(constants, offset, constants if wanted is None else wanted),
            *(by_row[-1], by_row[0]),
            *((by_column[-1], by_column[0]) if len(by_column) else (constants, constants)),
            *(rows.start, rows.stop - rows.start, len(block.regions), columns, segments),
            FORM=form,
            **_constants(block, cut),
            **options(cut),
        )
    return by_row, by_column


def _segments(blocks: int, tiles: int, programs: int) -> int:
    """How often to cut a block of rows, so that the busiest program has least to do; a tile more for every new item."""

    def busiest(segments: int) -> int:
        return triton.cdiv(blocks * segments, programs) * (triton.cdiv(tiles, segments) + 1)

    return min(range(1, min(tiles, MAX_SEGMENTS) + 1), key=busiest)


def _dropped(block: Block, rows: slice, symmetric: bool = False) -> Tensor:
    device, columns, panel = block.regions.device, len(block.texts), rows.stop - rows.start
    cut = tiles("filter", block.regions.dtype, device)
    words = torch.empty(panel, columns // WORD, dtype=torch.int32, device=device)
    _filter_kernel[(panel // cut.rows * (columns // cut.columns),)](
        *_descriptors(block.captions, block.texts, cut),
        *(_bytes(block.row_valid), _bytes(block.column_valid)),
        *(words, block.threshold, rows.start, columns),
        OWN=block.own,
        SYMMETRIC=symmetric,
        GROUP=GROUP,
        **products(block.regions, cut),
        **options(cut),
    )
    return words


def _operands(block: Block, rows: slice, cut: Tiles) -> tuple[Any, ...]:
    """Units of both sides; cosines of a panel of rows and their bits, or anything where there are none; valid ones."""
    valid = _bytes(block.row_valid), _bytes(block.column_valid)
    cosines = dropped = valid[0]
    if cut == FROM_CUBLAS:
        cosines = product(block.regions[rows], block.texts.T)
    if block.dropped is not None:
        dropped = block.dropped[rows]
    elif block.threshold is not None:
        dropped = _dropped(block, rows)
    return *_descriptors(block.regions, block.texts, cut), cosines, dropped, *valid


def _descriptors(a: Tensor, b: Tensor, cut: Tiles) -> tuple[TensorDescriptor, TensorDescriptor]:
    of_a = TensorDescriptor.from_tensor(a, [cut.rows, cut.width])
    return of_a, TensorDescriptor.from_tensor(b, [cut.columns, cut.width])


def _panels(block: Block, whole: bool = False) -> Iterator[slice]:
    """Of rows: such that what is kept of their pairs stays small, or all at once."""
    rows = len(block.regions)
    size = rows if whole else PANEL["rows"]
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _constants(block: Block, cut: Tiles) -> dict[str, Any]:
    own = {"OWN": block.own, "HAS_BITS": block.threshold is not None, "FROM_CUBLAS": cut == FROM_CUBLAS}
    return own | products(block.regions, cut)


def _bytes(flags: Tensor) -> Tensor:
    return flags.contiguous().view(torch.uint8)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


__all__ = [
    "dropped_pairs",
    "finish",
    "gradients",
    "negatives",
    "negatives_sigmoid",
    "prepare",
    "variants",
]
