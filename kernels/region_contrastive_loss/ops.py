"""The registered operators: both losses over the pairs of all ranks, whatever backend works on a block of them."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.flop_counter import register_flop_formula

from .block import LOG2E, Block, padded, weight_unit
from .exchange import Alone, Gather, Ring
from .filter import WORD
from .products import wide

MAX_GATHERED = 2**20
"""Bytes of a rank's texts up to which `auto` gathers those of all: see docs/kernels/region_contrastive_loss.md."""


def _kernels(backend: str) -> ModuleType:
    """The module of a backend; Triton is imported only when it is wanted."""
    return importlib.import_module(f".{backend}", __package__)


def _ranks(group: str, exchange: str, texts: Tensor) -> Alone:
    found = _group(group)
    if found is None or found.size() == 1:
        return Alone()
    if exchange == "auto":
        exchange = "gather" if texts.nbytes <= MAX_GATHERED else "ring"
    return {"ring": Ring, "gather": Gather}[exchange](found)


def all_ranks(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """own [...] of every rank: [size, ...]."""
    return Ring(group).all(own)


def _forward(
    regions: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    valid: Tensor,
    threshold: float | None,
    dtype: torch.dtype,
    group: str,
    exchange: str,
    keeps_filter: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and what the backward wants: unit rows, inverse norms; rows and columns, how many are valid; bits.

    rows [3, R]: log2 of their sums (of the sigmoid form: the sums of their slopes), slopes of the positives, valid or
    not; columns [2, ranks, R]: log2 of sums, valid or not. All fp64, but bits [ranks, R, R / 32].
    """
    kernels = _kernels(backend)
    with torch.autocast(regions.device.type, enabled=False), torch.cuda.device_of(regions):
        region_units, text_units, inverse, cosines, row_valid = kernels.prepare(regions, texts, valid, dtype)
        ranks = _ranks(group, exchange, text_units)
        scale, bias = _number(logit_scale), None if logit_bias is None else _number(logit_bias)
        positives = LOG2E * (cosines.double() * scale + (0 if bias is None else bias))  # in powers of two, as all sums
        # Ranks tell each other what is small at once: which rows are valid, and the logits of the positives.
        every_positive, every_valid = ranks.all(torch.stack([positives, row_valid.double()])).unbind(1)
        count = every_valid.sum().clamp(min=1)

        by_row: Tensor | None = None
        by_column, loss = torch.zeros_like(every_positive), positives.new_zeros(())
        bits = regions.new_empty(0, dtype=torch.int32)
        for owner, theirs in ranks.blocks(text_units):
            columns_valid, own = every_valid[owner].bool(), owner == ranks.rank
            block = Block(region_units, theirs, text_units, row_valid, columns_valid, own, scale, bias, threshold)
            if threshold is not None and keeps_filter:
                words = kernels.dropped_pairs(block)
                if ranks.size == 1:  # R^2 / 8 bytes, and no copy of them
                    bits = words[None]
                else:
                    bits = bits if bits.numel() else words.new_empty(ranks.size, *words.shape)
                    bits[owner] = words
                block = block.keeping(bits[owner])
            if bias is None:
                part, by_column[owner] = kernels.negatives(block)
                by_row = part if by_row is None else torch.logaddexp2(by_row, part)
            else:
                losses, part = kernels.negatives_sigmoid(block)
                loss += losses.sum(dtype=torch.float64)
                by_row = part.double() if by_row is None else by_row + part
        assert by_row is not None

        if bias is None:
            by_row = torch.logaddexp2(by_row, positives)
            by_column = torch.logaddexp2(_log2_of_sum(by_column, ranks), every_positive)
            own_column = by_column[ranks.rank]
            losses = math.log(2) / 2 * (by_row + own_column - 2 * positives)
            slope = (positives - by_row).exp2() + (positives - own_column).exp2() - 2
        else:
            losses = softplus(-positives / LOG2E, threshold=90)
            slope = -torch.sigmoid(-positives / LOG2E)
        loss = ranks.sum(loss + torch.where(row_valid, losses, 0).sum()) / count
    rows = torch.stack([by_row, torch.where(row_valid, slope, 0), row_valid.double()])
    columns = torch.stack([by_column, every_valid])
    return loss.to(wide(dtype)), region_units, text_units, inverse, rows, columns, count, bits


def _log2_of_sum(own: Tensor, ranks: Alone) -> Tensor:
    """log2 of the sum over ranks of 2^own."""
    if ranks.size == 1:
        return own
    highest = ranks.max(own.clone()).clamp(min=-1e300)
    return ranks.sum((own - highest).exp2_()).log2_().add_(highest)


def _number(value: Tensor) -> Tensor:
    return value.double().reshape(())


def _backward(
    grad: Tensor,
    regions: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    region_units: Tensor,
    text_units: Tensor,
    inverse: Tensor,
    rows: Tensor,
    columns: Tensor,
    count: Tensor,
    bits: Tensor,
    threshold: float | None,
    needs: list[bool],
    group: str,
    exchange: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of regions, texts, scale and bias; an empty tensor for one that nobody `needs`."""
    kernels = _kernels(backend)
    _, needs_texts, needs_scale, needs_bias = needs
    by_row, slope, valid = rows[0], rows[1], rows[2].bool()
    unit = weight_unit(region_units.dtype)
    with torch.autocast(regions.device.type, enabled=False), torch.cuda.device_of(regions):
        ranks = _ranks(group, exchange, text_units)
        scale, bias = _number(logit_scale), None if logit_bias is None else _number(logit_bias)
        of_regions = _differentiates_regions(needs)
        regions_grad = torch.zeros(region_units.shape, dtype=inverse.dtype, device=regions.device)
        for owner, theirs in ranks.blocks(text_units):
            columns_valid, own = columns[1, owner].bool(), owner == ranks.rank
            block = Block(region_units, theirs, text_units, valid, columns_valid, own, scale, bias, threshold)
            if bits.numel():
                block = block.keeping(bits[owner])
            part = kernels.gradients(
                block, by_row, columns[0, owner], regions_grad if of_regions else None, needs_texts
            )
            if needs_texts:
                ranks.give(owner, part)
        texts_grad = ranks.total() if needs_texts else regions_grad

        # Two directions, each the mean over all valid rows; the sigmoid loss has one.
        share = grad.double() / (count if bias is not None else 2 * count)
        results = [regions.new_empty(0) for _ in needs]
        if needs_bias and logit_bias is not None:
            results[3] = _like(logit_bias, (torch.where(valid, by_row, 0).sum() + slope.sum()) * share)
        share, slope = (share / unit).to(inverse.dtype), slope * unit
        factor = share * logit_scale.to(inverse.dtype).reshape(())
        along = slope  # until it is what a gradient has along its rows
        if of_regions:
            results[0], along = kernels.finish(regions, valid, regions_grad, inverse[0], slope, text_units, factor)
        if needs_texts:  # whose sums are of panels: tensor cores lose less in them than in those of a whole row
            results[1], along = kernels.finish(texts, valid, texts_grad, inverse[1], slope, region_units, factor)
        if needs_scale:
            results[2] = _like(logit_scale, along.sum(dtype=torch.float64) * share)
    return results[0], results[1], results[2], results[3]


def _differentiates_regions(needs: list[bool]) -> bool:
    """The scale's gradient is what those of the texts, or else of the regions, have along the unit rows."""
    return needs[0] or (needs[2] and not needs[1])


def _like(scalar: Tensor, value: Tensor) -> Tensor:
    return value.to(scalar.dtype).reshape(scalar.shape)


forward_op = torch.library.custom_op("locfast::region_contrastive_loss", _forward, mutates_args=())
backward_op = torch.library.custom_op("locfast::region_contrastive_loss_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(
    regions: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    valid: Tensor,
    threshold: float | None,
    dtype: torch.dtype,
    group: str,
    exchange: str,
    keeps_filter: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width = padded(regions.shape, backend)
    size = _size(group)
    words = (size, rows, -(-rows // WORD)) if threshold is not None and keeps_filter else (0,)
    return (
        regions.new_empty((), dtype=wide(dtype)),
        regions.new_empty((rows, width), dtype=dtype),
        regions.new_empty((rows, width), dtype=dtype),
        regions.new_empty((2, rows), dtype=wide(dtype)),
        regions.new_empty((3, rows), dtype=torch.float64),
        regions.new_empty((2, size, rows), dtype=torch.float64),
        regions.new_empty((), dtype=torch.float64),
        regions.new_empty(words, dtype=torch.int32),
    )


@backward_op.register_fake
def _(
    grad: Tensor,
    regions: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    region_units: Tensor,
    text_units: Tensor,
    inverse: Tensor,
    rows: Tensor,
    columns: Tensor,
    count: Tensor,
    bits: Tensor,
    threshold: float | None,
    needs: list[bool],
    group: str,
    exchange: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        regions.new_empty(regions.shape) if _differentiates_regions(needs) else regions.new_empty(0),
        texts.new_empty(texts.shape) if needs[1] else regions.new_empty(0),
        torch.empty_like(logit_scale) if needs[2] else regions.new_empty(0),
        torch.empty_like(logit_bias) if needs[3] and logit_bias is not None else regions.new_empty(0),
    )


def _group(name: str) -> dist.ProcessGroup | None:
    """The process group of a name: what an operator's schema can hold of it."""
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name) if name else None


def _size(name: str) -> int:
    group = _group(name)
    return 1 if group is None else group.size()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    regions, texts, scale, bias, _, ctx.threshold, _, ctx.group, ctx.exchange, _, ctx.backend = inputs
    ctx.save_for_backward(regions, texts, scale, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.locfast.region_contrastive_loss_backward(
        grad, *ctx.saved_tensors, ctx.threshold, needs, ctx.group, ctx.exchange, ctx.backend
    )
    return *(found if needed else None for found, needed in zip(grads, needs, strict=True)), *(None,) * 7


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "region_contrastive_loss: for a gradient of a gradient use backend='reference'; the others have none"
    )


forward_op.register_autograd(_differentiate, setup_context=_setup_context)
backward_op.register_autograd(_refuse)


@register_flop_formula(torch.ops.locfast.region_contrastive_loss)
def _forward_flops(
    regions: torch.Size,
    texts: torch.Size,
    scale: torch.Size,
    bias: torch.Size | None,
    valid: torch.Size,
    threshold: float | None,
    dtype: torch.dtype,
    group: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    """A product of R x R x E for the logits and one for the filter, two FLOPs a multiply-add."""
    return (2 if threshold is None else 4) * regions[0] ** 2 * _size(group) * regions[1]


@register_flop_formula(torch.ops.locfast.region_contrastive_loss_backward)
def _backward_flops(grad: torch.Size, regions: torch.Size, texts: torch.Size, *args: Any, **kwargs: Any) -> int:
    """The logits once more, and a product for either gradient that is needed."""
    _, needs, group = args[9:12]
    return (2 + 2 * _differentiates_regions(needs) + 2 * needs[1]) * regions[0] ** 2 * _size(group) * regions[1]
