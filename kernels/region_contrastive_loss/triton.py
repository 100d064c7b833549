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

from .block import FAINT, LOG2E, SAFE, Block, Sums, padded, shift_of, weight_unit
from .filter import WORD
from .products import product
from .tiles import COSINES, PANEL, Tiles, tiles
from .triton_backward import _backward_kernel
from .triton_constants import GROUP, options, products, row_constants
from .triton_filter import _filter_kernel
from .triton_forward import _forward_kernel, _positives_kernel
from .triton_rows import _finish_kernel, _prepare_kernel
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


def negatives(block: Block) -> tuple[Sums, Sums]:
    """As in tiled.py. Where a sum is so small that its terms may have been flushed to zero, all is done once more."""
    shift = shift_of(block.scale)
    (row_total,), (column_total,) = _sums(block, "shifted", -shift)
    smallest = torch.minimum(
        torch.where(block.row_valid, row_total, torch.inf).amin(),
        torch.where(block.column_valid, column_total, torch.inf).amin(),
    )
    again = (block.scale * LOG2E > SAFE) & (smallest < 2.0**FAINT)
    rows, columns = _sums(block, "online", torch.zeros_like(shift), again.to(torch.int32))
    return _either(again, rows, row_total, shift), _either(again, columns, column_total, shift)


def negatives_sigmoid(block: Block) -> tuple[Tensor, Tensor]:
    """As in tiled.py."""
    assert block.bias is not None
    (losses, slopes), _ = _sums(block, "sigmoid", block.bias * LOG2E)
    return losses * 0.6931471805599453, slopes


def gradients(
    block: Block, row_log2: Tensor, column_log2: Tensor, regions_grad: Tensor | None, needs_texts: bool
) -> Tensor | None:
    """As in tiled.py."""
    dtype, columns = block.regions.dtype, len(block.texts)
    cut = tiles("backward", dtype, block.regions.device)
    shift = shift_of(block.scale)
    if block.bias is None:
        lowest = torch.minimum(
            torch.where(block.row_valid, row_log2, torch.inf).amin(),
            torch.where(block.column_valid, column_log2, torch.inf).amin(),
        )
        apart = (block.scale * LOG2E > SAFE) & (lowest < shift + FAINT)
        peaks = [torch.where(apart, log2.round(), shift) for log2 in (row_log2, column_log2)]
        inverses = [(peak - log2).exp2().float() for peak, log2 in zip(peaks, (row_log2, column_log2), strict=True)]
        peaks = [peak.float() for peak in peaks]
        offset = torch.where(apart, 0, -shift)
    else:
        apart, offset = block.scale > torch.inf, block.bias * LOG2E
        peaks = inverses = [block.scale, block.scale]  # which are not read
    panel = min(PANEL["rows"], len(block.regions))
    weights = torch.empty(panel, columns, dtype=dtype, device=block.regions.device)
    texts_grad = None
    for rows in _panels(block):
        part = weights[: rows.stop - rows.start]
        _backward_kernel[(len(part) // cut.rows * (columns // cut.columns),)](
            *_operands(block, rows, cut),
            *(_in_two(block.scale * LOG2E), _in_two(offset), apart.to(torch.int32)),
            *(peaks[0], inverses[0], peaks[1], inverses[1]),
            *(part, rows.start, columns),
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


def _sums(block: Block, form: str, offset: Tensor, wanted: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """What the forward kernel adds up for rows and for columns: totals, and peaks (of "sigmoid" slopes) after them."""
    device, columns = block.regions.device, len(block.texts)
    cut = tiles("forward" if form == "shifted" else form, block.regions.dtype, device)
    programs = cut.programs * _multiprocessors(device)
    kept = {"shifted": 1, "online": 2, "sigmoid": 0}[form]
    column_sums = torch.empty(kept, programs, columns, device=device)
    row_sums: list[list[Tensor]] = []
    decided = block.threshold is None or block.dropped is not None
    for rows in _panels(block, whole=decided and not _from_cublas()):
        panel = rows.stop - rows.start
        segments = _segments(panel // cut.rows, columns // cut.columns, programs)
        sums = torch.empty(1 if form == "shifted" else 2, segments, panel, device=device)
        _forward_kernel[(programs,)](
            *_operands(block, rows, cut),
            *(_in_two(block.scale * LOG2E), _in_two(offset), sums if wanted is None else wanted),
            *(sums[-1], sums[0]),
            *((column_sums[-1], column_sums[0]) if kept else (sums, sums)),
            *(rows.start, panel, columns, segments),
            FORM=form,
            **_constants(block, cut),
            **options(cut),
        )
        row_sums.append(_together(sums, form))
    by_row = [torch.cat(parts) for parts in zip(*row_sums, strict=True)]
    return by_row, _together(column_sums, form)


def _segments(blocks: int, tiles: int, programs: int) -> int:
    """How often to cut a block of rows, so that the busiest program has least to do; a tile more for every new item."""

    def busiest(segments: int) -> int:
        return triton.cdiv(blocks * segments, programs) * (triton.cdiv(tiles, segments) + 1)

    return min(range(1, min(tiles, MAX_SEGMENTS) + 1), key=busiest)


def _together(sums: Tensor, form: str) -> list[Tensor]:
    """From sums [parts, R] of disjoint terms to those of all."""
    if form != "online":
        return list(sums.sum(1))
    total, peak = sums
    highest = peak.amax(0)
    return [(total * (peak - highest).exp2()).sum(0), highest]


def _in_two(number: Tensor) -> Tensor:
    """An fp64 number as [2] fp32 whose sum it is, to 48 bits."""
    high = number.float()
    return torch.stack([high, (number - high).float()])


def _either(again: Tensor, online: list[Tensor], total: Tensor, shift: Tensor) -> Sums:
    return Sums(torch.where(again, online[1], shift), torch.where(again, online[0], total))


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
    if _from_cublas():
        cosines = product(block.regions[rows], block.texts.T)
    if block.dropped is not None:
        dropped = block.dropped[rows]
    elif block.threshold is not None:
        dropped = _dropped(block, rows)
    return *_descriptors(block.regions, block.texts, cut), cosines, dropped, *valid


def _descriptors(a: Tensor, b: Tensor, cut: Tiles) -> tuple[TensorDescriptor, TensorDescriptor]:
    of_a = TensorDescriptor.from_tensor(a, [cut.rows, cut.width])
    return of_a, TensorDescriptor.from_tensor(b, [cut.columns, cut.width])


def _from_cublas() -> bool:
    return COSINES["from"] == "cublas"


def _panels(block: Block, whole: bool = False) -> Iterator[slice]:
    """Of rows: such that what is kept of their pairs stays small, or all at once."""
    rows = len(block.regions)
    size = rows if whole else PANEL["rows"]
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _constants(block: Block, cut: Tiles) -> dict[str, Any]:
    own = {"OWN": block.own, "HAS_BITS": block.threshold is not None, "FROM_CUBLAS": _from_cublas()}
    own["PRECISE"] = block.regions.dtype == torch.float32
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
