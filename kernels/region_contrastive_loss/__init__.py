"""Contrastive losses of regions and their captions in which near-duplicate captions are no negatives: CLOC's loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _backend
from . import ops, reference
from .checks import agree_once, check, check_number
from .products import wide

OP = "region_contrastive_loss"
FACTS = ("regions and texts", "dtype", "filter_threshold", "exchange", "keep_filter", "backend", "requires_grad")
"""What ranks must agree on, beside the scale and the bias."""


def region_contrastive_loss(
    regions: Tensor,
    texts: Tensor,
    *,
    logit_scale: Tensor | float,
    filter_threshold: float | None = 0.9,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    exchange: str = "auto",
    keep_filter: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The symmetric InfoNCE between region and caption embeddings, without pairs whose captions are nearly the same.

    regions and texts [R, E], of one floating dtype, row i of either belongs together; both are normalised here.
    logit_scale: what cosines are multiplied with, one number (CLIP's after `exp`), a tensor where it is trained.
    filter_threshold: the pair (i, j), i != j, is in no denominator where the cosine of texts i and j is strictly above
    it; None keeps all, which is CLIP's loss. Texts are normalised in fp32 and rounded to the dtype of the products
    before they are compared, and no gradient goes through the comparison.
    valid [R] bool: a row that is not valid is neither row nor column, whatever it holds, and its gradient is zero.
    group: ranks whose rows make up the whole batch; None: this process alone. All call with as many rows, one scale and
    the same options, and want gradients of the same inputs: whoever differs is told so at the first such call.
      ->  a scalar, fp32 (fp64 for fp64 inputs): the mean over the valid rows of all ranks of both directions' losses,
    the same on every rank; 0 where no row is valid. CLOC, equation 2 and section 3.4.

    Differentiable in regions, texts and logit_scale; on the reference backend twice. A rank's gradients are the whole
    loss's: exact for its rows, and for logit_scale the share of its rows, as for any weight in front of them, so that
    the sum over ranks is the whole. DistributedDataParallel averages instead: under it, multiply the loss by the
    number of ranks. Under autocast inputs are rounded to its dtype once they are normalised.

    exchange: how texts reach other ranks: `ring`, `gather` (memory for the texts of all ranks), or `auto` by size.
    keep_filter: keep one bit for every pair of a rank's texts with all texts, or decide anew in the backward.
    Nothing of size R x R is stored but these bits, except by `reference`. Deterministic.
    Raises ValueError for shapes, dtypes and names that do not fit or differ between ranks, BackendError for a named
    backend that cannot run.
    """
    check(regions, texts, logit_scale, filter_threshold, valid, group, exchange, keep_filter)
    arguments = (regions, texts, logit_scale, None, filter_threshold, valid, group, exchange, keep_filter)
    return _loss(*arguments, backend)


def region_sigmoid_loss(
    regions: Tensor,
    texts: Tensor,
    *,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    filter_threshold: float | None = 0.9,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    exchange: str = "auto",
    keep_filter: bool = True,
    backend: str = "auto",
) -> Tensor:
    """SigLIP's loss in place of the softmax: every pair that counts is one or none, on its own.

    -log sigmoid(z (logit_scale cos + logit_bias)), z = 1 for a region and its own text, -1 for others, summed over
    texts and averaged over valid regions. logit_bias: one number (SigLIP starts at -10), a tensor where it is trained;
    its gradient is the share of this rank's rows, as that of logit_scale. All else as in `region_contrastive_loss`.
    CLOC names it as the alternative that needs less memory.
    """
    check(regions, texts, logit_scale, filter_threshold, valid, group, exchange, keep_filter)
    check_number("logit_bias", logit_bias, regions.device)
    arguments = (regions, texts, logit_scale, logit_bias, filter_threshold, valid, group, exchange, keep_filter)
    return _loss(*arguments, backend)


def _loss(
    regions: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    threshold: float | None,
    valid: Tensor | None,
    group: dist.ProcessGroup | None,
    exchange: str,
    keep_filter: bool,
    backend: str,
) -> Tensor:
    device, dtype = regions.device, regions.dtype
    if device.type != "meta" and torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    if valid is None:
        valid = torch.ones(len(regions), dtype=torch.bool, device=device)
    scale = _number(logit_scale, dtype, device)
    bias = None if logit_bias is None else _number(logit_bias, dtype, device)
    chosen = _backend.choose(OP, device, dtype, backend)
    if group is not None and group.size() > 1:
        numbers = (list(regions.shape), str(dtype).removeprefix("torch."), threshold, exchange, keep_filter, chosen)
        trained = torch.is_grad_enabled() and (regions.requires_grad, texts.requires_grad)
        agree_once(group, dict(zip(FACTS, (*numbers, trained), strict=True)))
    if chosen == "reference":
        return _reference(regions, texts, scale, bias, threshold, valid, group, dtype)
    name = "" if group is None else group.group_name
    return ops.forward_op(regions, texts, scale, bias, valid, threshold, dtype, name, exchange, keep_filter, chosen)[0]


def _number(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor, made without a wait for the device."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=wide(dtype), device=device)


def _reference(
    regions: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: float | None,
    valid: Tensor,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype,
) -> Tensor:
    """Every rank computes the whole, and differentiates what is its own."""

    def whole(own: Tensor) -> Tensor:
        return own if group is None or group.size() == 1 else _all_but_own_detached(own, group)

    def of_rows(number: Tensor) -> Tensor:
        return whole(number.to(wide(dtype)).reshape(1).expand(len(regions)))

    inputs, facts = (whole(regions), whole(texts), of_rows(scale)), (threshold, whole(valid), dtype)
    with torch.autocast(regions.device.type, enabled=False):
        if bias is None:
            return reference.region_contrastive_loss(*inputs, *facts)
        return reference.region_sigmoid_loss(*inputs, of_rows(bias), *facts)


def _all_but_own_detached(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts: list[Any] = list(ops.all_ranks(own.detach(), group).unbind(0))
    parts[group.rank()] = own
    return torch.cat(parts)


_backend.register(OP, {"triton": _backend.triton_probe, "tiled": _backend.anywhere, "reference": _backend.anywhere})

__all__ = ["region_contrastive_loss", "region_sigmoid_loss"]
