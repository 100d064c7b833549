"""Inputs for the region losses, and how right their results are: shared by the tests of every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from locfast.kernels import _backend
from locfast.kernels.region_contrastive_loss import reference, region_contrastive_loss, region_sigmoid_loss
from locfast.kernels.region_contrastive_loss.filter import in_fixed_order

from .attention_reference import Rounded
from .tolerance import assert_close_as_dtype_allows, assert_no_lost_gradient

FUSED = ("tiled", "triton")
FORMS = ("contrastive", "sigmoid")
THRESHOLD = 0.9
BIAS = -3.0
NAMES = ("loss", "regions.grad", "texts.grad", "logit_scale.grad", "logit_bias.grad")
GRAD = 48.0
"""Of the loss, as a gradient scaler would have it: fp16 loses what is under 6e-8."""

Inputs = tuple[Tensor, Tensor, Tensor]
"""Regions, texts, logit_scale."""


def usable(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    try:
        _backend.choose("region_contrastive_loss", device, dtype, backend)
    except _backend.BackendError as error:
        pytest.skip(str(error))


def make_inputs(
    rows: int, width: int, dtype: torch.dtype, device: Any = "cpu", scale: float = 10.0, seed: int = 0
) -> Inputs:
    """Regions, texts and scale: positives and some negatives of cosines near 1, 0 and -1, groups of one caption.

    A caption is one of at most rows / 2 that are far apart, with a little noise: of its pairs some are above THRESHOLD,
    and none is near it.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)

    kinds: list[Tensor] = []
    for kind in draw(4 * rows):
        if len(kinds) < max(1, rows // 2) and all(abs(kind @ other) < 0.8 for other in kinds):
            kinds.append(kind)
    which = torch.randint(len(kinds), (rows,), generator=generator)
    texts = torch.stack(kinds)[which] + 0.03 * draw(rows)
    ones = F.normalize(texts, dim=-1)
    towards = ones[torch.arange(rows) // 2 * 2]  # in every other row another row's text
    across = draw(rows)
    across = F.normalize(across - (across * towards).sum(-1, keepdim=True) * towards, dim=-1)
    kind = ((torch.arange(rows) + 1) % 5)[:, None]
    regions = torch.where(kind < 3, (1.0 - kind) * towards + (kind == 1) * across, draw(rows)) + 0.01 * draw(rows)
    regions *= 0.5 + torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    regions, texts = regions.to(dtype), (1.5 * texts).to(dtype)
    assert_no_text_near_the_threshold(texts, THRESHOLD)
    return regions.to(device), texts.to(device), torch.tensor(scale, device=device)


def assert_no_text_near_the_threshold(texts: Tensor, threshold: float) -> None:
    """Or the truth, whose sums are in fp64, might drop other pairs; 1e-3 is above what sums in fp32 can differ by."""
    units = F.normalize(texts.double(), dim=-1).to(texts.dtype).double()
    assert ((units @ units.T - threshold).abs() > 1e-3).all()


def a_third_invalid(regions: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Regions and texts with what is not finite in a third of the rows, and which rows are valid."""
    regions, texts = regions.clone(), texts.clone()
    valid = torch.arange(len(regions), device=regions.device) % 3 != 1
    regions[~valid], texts[~valid, ::2] = float("nan"), float("inf")
    return regions, texts, valid


def run(
    inputs: Inputs,
    form: str,
    backend: str,
    valid: Tensor | None = None,
    threshold: float | None = THRESHOLD,
    bias: float = BIAS,
    **options: Any,
) -> list[Tensor]:
    """The loss and the gradients of all inputs, in the order of NAMES."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    options |= dict(valid=valid, filter_threshold=threshold, backend=backend, logit_scale=leaves[2])
    if form == "contrastive":
        loss = region_contrastive_loss(leaves[0], leaves[1], **options)
    else:
        leaves.append(torch.full_like(inputs[2], bias, requires_grad=True))
        loss = region_sigmoid_loss(leaves[0], leaves[1], logit_bias=leaves[3], **options)
    return [loss.detach(), *torch.autograd.grad(GRAD * loss, leaves)]


def truth(
    inputs: Inputs,
    form: str,
    valid: Tensor | None = None,
    threshold: float | None = THRESHOLD,
    bias: float = BIAS,
) -> list[Tensor]:
    """The reference in fp64. Texts are compared after they are rounded to the inputs' dtype: that is the definition."""
    leaves = [x.detach().double().requires_grad_() for x in (*inputs, torch.full_like(inputs[2], bias))]
    scale, shift = (x.expand(len(inputs[0])) for x in leaves[2:])
    valid = torch.ones_like(scale, dtype=torch.bool) if valid is None else valid
    rest = (threshold, valid, inputs[0].dtype)
    if form == "contrastive":
        loss = reference.region_contrastive_loss(*leaves[:2], scale, *rest)
        leaves.pop()
    else:
        loss = reference.region_sigmoid_loss(*leaves[:2], scale, shift, *rest)
    return [loss.detach(), *torch.autograd.grad(GRAD * loss, leaves)]


class RoundedGradient(torch.autograd.Function):
    """Weights as the products of the backward take them: rounded, in fp16 times 2^14, or small ones would be lost."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        unit = 2.0**14 if ctx.dtype == torch.float16 else 1.0
        return (grad * unit).to(ctx.dtype).to(grad.dtype) / unit, None


def same(
    inputs: Inputs,
    form: str,
    valid: Tensor | None = None,
    threshold: float | None = THRESHOLD,
    bias: float = BIAS,
) -> list[Tensor]:
    """The losses over all pairs at once in fp32, with unit rows, weights and gradients rounded to the inputs' dtype."""
    dtype, rows = inputs[0].dtype, len(inputs[0])
    valid = torch.ones(rows, dtype=torch.bool, device=inputs[0].device) if valid is None else valid
    leaves = [x.detach().float().requires_grad_() for x in (*inputs, torch.full_like(inputs[2], bias))]
    regions, texts = (Rounded.apply(F.normalize(x[valid], dim=-1), dtype) for x in leaves[:2])
    logits = leaves[2] * (regions @ texts.T) + (leaves[3] if form == "sigmoid" else 0)
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = torch.where(own, logits, RoundedGradient.apply(logits, dtype))  # the positives need no product
    none = torch.zeros_like(own) if threshold is None else (texts @ texts.T > threshold) & ~own
    if form == "contrastive":
        leaves.pop()
        logits = logits.masked_fill(none, -torch.inf)
        total, share = (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()).sum(), len(logits) * 2
    else:
        losses = -F.logsigmoid(torch.where(own, logits, -logits))
        total, share = losses.masked_fill(none, 0).sum(), len(logits)
    grads = torch.autograd.grad(total, leaves)
    return [
        total.detach() / share,
        *((GRAD / share * grad).to(x.dtype) for x, grad in zip((*inputs, inputs[2]), grads, strict=False)),
    ]


def check(inputs: Inputs, form: str, backend: str, **options: Any) -> None:
    """Loss and gradients as right as the dtype allows; see tolerance.py."""
    keywords = {name: options[name] for name in ("valid", "threshold", "bias") if name in options}
    found, right, rounded = run(inputs, form, backend, **options), truth(inputs, form, **keywords), []
    for turned in turns(inputs):
        rounded.append((same(turned, form, **keywords), truth(turned, form, **keywords)))
    for i, (name, a, c) in enumerate(zip(NAMES, found, right, strict=False)):
        b = rounded[0][0][i]
        if b.dtype == torch.float32:
            # The error of one number, and the largest of a few rows at a high scale, is luck: the worst of some counts.
            b = (c + max((b[i].double() - c[i] for b, c in rounded), key=lambda error: error.abs().max())).float()
        assert_close_as_dtype_allows(a, b, c, name)
        assert_no_lost_gradient(a, c, name)


def turns(inputs: Inputs) -> list[Inputs]:
    """The inputs, and the same reflected at random planes: equal losses and sizes of gradients, other roundings."""
    regions, texts, scale = inputs
    generator, results = torch.Generator().manual_seed(len(regions)), [inputs]
    for _ in range(8):
        normal = torch.randn(regions.shape[1], generator=generator, dtype=torch.float64).to(regions.device)
        normal /= normal.norm()
        turned = ((x.double() - 2 * (x.double() @ normal)[:, None] * normal).to(x.dtype) for x in (regions, texts))
        results.append((*turned, scale))
    return results


def on_the_threshold(rows: int, width: int, dtype: torch.dtype, device: Any = "cpu") -> tuple[Tensor, float]:
    """Texts of whose pairs many have one cosine up to the order of its sum, and one of those as a threshold.

    A vector turned cyclically, row by row: pairs that are equally far apart sum the same products, begun elsewhere.
    """
    vector = torch.randn(width, generator=torch.Generator().manual_seed(width)) ** 5  # small parts, or sums are exact
    texts = torch.stack([vector.roll(row) for row in range(rows)]).to(device, dtype)
    units = F.normalize(texts.float(), dim=-1).to(dtype).float()
    cosines = [in_fixed_order(units[:-apart], units[apart:], torch.float32).unique() for apart in range(1, width // 2)]
    most = max(cosines, key=len)
    assert len(most) > 1, "no pair is above the threshold, or all are"
    return texts, most[(len(most) - 1) // 2].item()
