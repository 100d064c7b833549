"""The losses in panels of rows: plain PyTorch, a panel of logits in memory at a time, computed anew in the backward.

Every sum has one order: deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .block import LOG2E, Block, weight_unit
from .filter import WORD, exceeds, pack, unpack
from .products import product, wide

MAX_PANEL = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Pairs in memory at a time: within a processor's last cache, and enough to fill a GPU."""


def prepare(
    regions: Tensor, texts: Tensor, valid: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """regions, texts [R, E], valid [R]  ->  unit rows of both in `dtype`, inverse norms [2, R], cosines [R], valid.

    Rows that are not valid become zeros by selection: what they hold reaches nothing.
    """
    units, inverse = [], []
    for x in (regions, texts):
        x = x.to(wide(dtype)).masked_fill(~valid[:, None], 0)
        inverse.append(x.norm(dim=-1).clamp(min=1e-12).reciprocal())
        units.append((x * inverse[-1][:, None]).to(dtype))
    cosines = (units[0].to(wide(dtype)) * units[1].to(wide(dtype))).sum(-1)
    return units[0], units[1], torch.stack(inverse), cosines, valid


def dropped_pairs(block: Block) -> Tensor:
    """Words [M, ceil(N / 32)]: the pairs that count nowhere."""
    words = block.texts.new_empty(len(block.regions), -(-len(block.texts) // WORD), dtype=torch.int32)
    for rows in _panels(block):
        words[rows] = pack(_dropped(block, rows))
    return words


def negatives(block: Block) -> tuple[Tensor, Tensor]:
    """log2 of the sums of e^logit over the pairs that count, by row and by column: fp64, -inf of an empty sum."""
    by_row, column_peak, column_total = [], None, None
    for rows in _panels(block):
        logits = _logits(block, rows).masked_fill_(_dropped(block, rows), -torch.inf)
        peak = _finite(logits.amax(1))
        by_row.append(_log2(torch.exp(logits - peak[:, None]).sum(1), peak))
        peak = _finite(logits.amax(0))
        total = torch.exp(logits.sub_(peak)).sum(0)
        if column_peak is not None and column_total is not None:
            higher = torch.maximum(peak, column_peak)
            total = total * torch.exp(peak - higher) + column_total * torch.exp(column_peak - higher)
            peak = higher
        column_peak, column_total = peak, total
    assert column_peak is not None and column_total is not None
    return torch.cat(by_row), _log2(column_total, column_peak)


def negatives_sigmoid(block: Block) -> tuple[Tensor, Tensor]:
    """Sums over every row's pairs that count of log(1 + e^logit) and of its derivative: [M] each."""
    losses, slopes = [], []
    for rows in _panels(block):
        dropped = _dropped(block, rows)
        logits = _logits(block, rows)
        losses.append(F.softplus(logits, threshold=80).masked_fill_(dropped, 0).sum(1))
        slopes.append(logits.sigmoid_().masked_fill_(dropped, 0).sum(1))
    return torch.cat(losses), torch.cat(slopes)


def gradients(
    block: Block, row_log2: Tensor, column_log2: Tensor, regions_grad: Tensor | None, needs_texts: bool
) -> Tensor | None:
    """Add to regions_grad [M, E], and return for the texts [N, E], the sums of weight times the other's unit row.

    A weight is the derivative of the sum of both directions' losses, or of the sigmoid loss, with respect to a logit.
    row_log2 [M], column_log2 [N]: fp64, of the sums over a whole row and column. Weights count `weight_unit` each.
    """
    dtype, texts_grad = block.regions.dtype, None
    row_peak, row_inverse = _apart(row_log2, block)
    column_peak, column_inverse = _apart(column_log2, block)
    for rows in _panels(block):
        logits = _logits(block, rows)
        if block.bias is None:
            weights = torch.exp(logits - row_peak[rows, None]) * row_inverse[rows, None]
            weights += logits.sub_(column_peak).exp_() * column_inverse
        else:
            weights = logits.sigmoid_()
        weights = weights.masked_fill_(_dropped(block, rows), 0).mul_(weight_unit(dtype)).to(dtype)
        if regions_grad is not None:
            product(weights, block.texts, regions_grad[rows])
        if needs_texts:
            texts_grad = product(weights.T, block.regions[rows], texts_grad)
    return texts_grad


def finish(
    x: Tensor, valid: Tensor, grad: Tensor, inverse: Tensor, slope: Tensor, partner: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradient of unit rows to that of x [R, E], in x's dtype; and its part along the rows, [R].

    grad [R, E] lacks the positives: slope [R] times partner [R, E]. inverse [R]: of x's norms. factor []: of all.
    """
    grad = torch.addcmul(grad, slope.to(grad.dtype)[:, None], partner.to(grad.dtype))
    unit = x.to(grad.dtype).masked_fill(~valid[:, None], 0) * inverse[:, None]
    along = (unit * grad).sum(-1)
    short = inverse >= 1e12  # a norm that is clamped does not change with x
    result = (grad - unit * along.masked_fill(short, 0)[:, None]) * (factor * inverse)[:, None]
    return result.to(x.dtype), along


def _logits(block: Block, rows: slice) -> Tensor:
    logits = product(block.regions[rows], block.texts.T).mul_(block.scale)
    return logits if block.bias is None else logits.add_(block.bias)


def _dropped(block: Block, rows: slice) -> Tensor:
    columns = len(block.texts)
    if block.dropped is not None:
        return unpack(block.dropped[rows], columns)
    dropped = ~(block.row_valid[rows, None] & block.column_valid)
    if block.threshold is not None:
        dropped |= exceeds(block.captions[rows], block.texts, block.threshold)
    if block.own:
        dropped.diagonal(rows.start).fill_(True)
    return dropped


def _log2(total: Tensor, peak: Tensor) -> Tensor:
    """Of total * e^peak."""
    return total.double().log2() + peak.double() * LOG2E


def _apart(log2: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """1 / sum as e^-peak * inverse: a logarithm in fp32 would cost what its peak, a whole number, does not."""
    natural, dtype = log2 / LOG2E, wide(block.regions.dtype)
    return natural.round().to(dtype), (natural.round() - natural).exp().to(dtype)


def _finite(peak: Tensor) -> Tensor:
    """Of a row without a pair any number does, but not -inf, whose difference with itself is NaN."""
    return peak.clamp(min=-1e30)


def _panels(block: Block) -> Iterator[slice]:
    rows, columns = len(block.regions), len(block.texts)
    size = max(1, MAX_PANEL["cuda" if block.regions.device.type == "cuda" else "cpu"] // columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
