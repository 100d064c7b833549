"""Inputs of the region-contrastive benchmark, and how right a loss is on them, without anything of R x R in memory.

The truth is computed in fp64 in panels of rows: the loss and the gradient of its scale from all pairs, gradients of
embeddings for some rows. Where R x R fits, the truth itself is held to the op's reference in fp64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import _harness  # noqa: F401  (puts the checkout on the path)
import torch
from _attention_check import WRONG, relative_error
from baselines.contrastive import Loss
from torch import Tensor
from torch.nn import functional as F

from locfast.kernels.region_contrastive_loss import region_contrastive_loss
from locfast.kernels.region_contrastive_loss.products import product
from tests.kernels.tolerance import assert_close_as_dtype_allows

DTYPE = torch.bfloat16
PANEL = 1 << 27
"""Pairs in memory at a time: 1 GiB in fp64, a few times."""
WHOLE = 8192
"""Regions up to which gradients of all rows are compared, and the truth with the reference."""
SOME = 1024
"""Rows beyond: at 131072 regions one of every 128, a row in each tile of a kernel."""
NEAR = 64
"""One caption in so many is nearly another one: cosine 0.99. All other cosines are far below a threshold of 0.9."""
TRAINED = 0.15
"""Cosine of a region and its caption: at a scale of 100 about as likely as all 32768 others together."""
NAMES = ("loss", "logit_scale.grad", "regions.grad", "texts.grad")


@dataclass(frozen=True)
class Shape:
    """R regions, embeddings of width E, and what makes the loss another one."""

    regions: int
    width: int
    scale: float = 100.0
    threshold: float | None = 0.9

    def flops(self, direction: str) -> int:
        """By products of R x R x E that the loss needs, whatever is executed."""
        products = {"forward": 1, "both": 4}[direction] + (0 if self.threshold is None else 1)
        return 2 * products * self.regions**2 * self.width

    @property
    def letters(self) -> dict[str, int]:
        return {"R": self.regions, "E": self.width}

    @property
    def name(self) -> str:
        threshold = "no filter" if self.threshold is None else f"filter {self.threshold:g}"
        return f"R {self.regions}, E {self.width}, scale {self.scale:g}, {threshold}, bf16"


class Inputs:
    """Embeddings that nobody normalised: regions that know a little of their captions; some captions recur."""

    def __init__(self, shape: Shape, device: torch.device, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)
        make = functools.partial(torch.randn, shape.regions, shape.width, generator=generator, device=device)
        texts = make() / shape.width**0.5
        order = torch.randperm(shape.regions, generator=generator, device=device)
        copies, sources = order[: shape.regions // NEAR], order[-(shape.regions // NEAR) :]
        texts[copies] = texts[sources] + 0.14 * texts[copies]  # tan of the angle whose cosine is 0.99
        regions = TRAINED * texts + (1 - TRAINED**2) ** 0.5 * make() / shape.width**0.5
        scale = torch.tensor(shape.scale, device=device)
        self.threshold = shape.threshold
        self.plain = (regions.to(DTYPE), texts.to(DTYPE), scale)
        self.leaves = tuple(x.detach().requires_grad_() for x in self.plain)

    def forward(self, loss: Loss) -> Tensor:
        with torch.no_grad():
            return loss(*self.leaves, self.threshold)

    def both(self, loss: Loss) -> tuple[Tensor, ...]:
        """The loss, and gradients of regions, texts and scale."""
        out = loss(*self.leaves, self.threshold)
        return (out.detach(), *torch.autograd.grad(out, self.leaves))


@dataclass(frozen=True)
class Right:
    """What the equation gives with products in one dtype. S: the rows that are compared."""

    loss: Tensor
    scale_grad: Tensor
    losses: Tensor
    """[S], whose mean over all rows is the loss."""
    slopes: Tensor
    """[S], whose mean over all rows is the scale's gradient."""
    regions_grad: Tensor
    """[S, E]"""
    texts_grad: Tensor


class Judge:
    """Knows the right results on some inputs, once they are asked for."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        count, device = len(inputs.plain[0]), inputs.plain[0].device
        self.rows = torch.arange(count, device=device)
        if count > WHOLE:
            self.rows = (self.rows[:SOME] * count) // SOME
            self.rows += torch.arange(SOME, device=device) * 37 % (count // SOME)  # not the same row of every tile

    def ours(self, found: tuple[Tensor, ...]) -> None:
        """The rule that kernels' tests hold them to. found: the loss, or what `Inputs.both` gives. AssertionError."""
        for name, one, same, truth in self._compare(found):
            assert_close_as_dtype_allows(one, same, truth, name)

    def peer(self, found: tuple[Tensor, ...]) -> str:
        """What to note of a peer's accuracy; AssertionError where it computes something else."""
        note, worst = "", 0.0
        for name, one, same, truth in self._compare(found):
            error, forced = relative_error(one, truth), relative_error(same, truth)
            assert error <= WRONG, f"{name}: relative L2 error {error:.2g}"
            if error > worst and error > 2 * forced + torch.finfo(same.dtype).eps:
                note = f"less exact: relative L2 error {error:.1e} in {name}, rounding alone costs {forced:.1e}"
                worst = error
        return note

    def _compare(self, found: tuple[Tensor, ...]) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        results = [found[0]]
        if len(found) > 1:
            results += [found[3], found[1][self.rows], found[2][self.rows]]
        return [(name, one, *right) for name, one, right in zip(NAMES, results, self.right, strict=False)]

    @functools.cached_property
    def right(self) -> list[tuple[Tensor, Tensor]]:
        """(what rounding alone gives, the truth) by NAMES."""
        same, truth = by_panels(self.inputs, self.rows, DTYPE), by_panels(self.inputs, self.rows, torch.float64)
        if len(self.inputs.plain[0]) <= WHOLE:
            agree_with_reference(self.inputs, truth)
        count = len(self.inputs.plain[0])
        return [
            (_forced(same.loss, truth.loss, same.losses - truth.losses, count), truth.loss),
            (_forced(same.scale_grad, truth.scale_grad, same.slopes - truth.slopes, count), truth.scale_grad),
            (same.regions_grad.to(DTYPE), truth.regions_grad),
            (same.texts_grad.to(DTYPE), truth.texts_grad),
        ]


def _forced(same: Tensor, truth: Tensor, errors: Tensor, count: int) -> Tensor:
    """A mean over `count` rows, as far off as rounding makes it: one mean may be right by luck, its rows not."""
    usual = errors.square().mean().sqrt() / count**0.5
    return (truth + torch.maximum((same - truth).abs(), usual)).float()


def by_panels(inputs: Inputs, rows: Tensor, dtype: torch.dtype) -> Right:
    """Unit rows, weights and embeddings' gradients rounded to `dtype`, products summed in fp32; all else in fp64."""
    threshold, scale = inputs.threshold, inputs.plain[2].double()
    count = len(inputs.plain[0])
    wide = [x.double() for x in inputs.plain[:2]]
    units = [F.normalize(x, dim=-1) for x in wide]
    u, t = (x.to(dtype) for x in units)
    captions = units[1].to(DTYPE)

    def dropped(rows: Tensor) -> Tensor:
        similar = torch.zeros(len(rows), count, dtype=torch.bool, device=rows.device)
        if threshold is not None:
            similar = product(captions[rows], captions.T) > threshold
            similar[torch.arange(len(rows), device=rows.device), rows] = False
        return similar

    # Sums of e^(logit - scale), which fp64 holds down to the least cosine, so that no maximum is needed.
    sums, cosines = torch.zeros(2, 2, count, dtype=torch.float64, device=rows.device)
    for part in _panels(torch.arange(count, device=rows.device), count):
        cosine = product(u[part], t.T).double()
        weights = ((cosine - 1) * scale).exp_().masked_fill_(dropped(part), 0)
        sums[0, part] = weights.sum(1)
        sums[1] += weights.sum(0)
        weights *= cosine
        cosines[0, part] = weights.sum(1)
        cosines[1] += weights.sum(0)
    positive = (u.double() * t.double()).sum(1)
    log_sums = sums.log() + scale
    losses = log_sums.mean(0) - scale * positive

    def side(own: int, theirs: int) -> tuple[Tensor, Tensor]:
        """Of the rows: the gradient of own embeddings, and its part along them, which is the slope of their loss."""
        mine, others = (u, t)[own], (u, t)[theirs]
        grads, slopes = [], []
        for part in _panels(rows, count):
            logits = product(mine[part], others.T).double().mul_(scale)
            weights = (logits - log_sums[own, part, None]).exp_() + (logits - log_sums[theirs]).exp_()
            weights = weights.masked_fill_(dropped(part), 0)
            weights[torch.arange(len(part), device=part.device), part] -= 2
            grad, unit = product(weights.to(dtype), others).double(), units[own][part]
            along = (unit * grad).sum(-1, keepdim=True)
            grads.append((grad - unit * along) / wide[own][part].norm(dim=-1, keepdim=True) * scale / (2 * count))
            slopes.append(along[:, 0] / 2)
        return torch.cat(grads), torch.cat(slopes)

    regions_grad, slopes = side(0, 1)
    texts_grad, _ = side(1, 0)
    scale_grad = ((cosines / sums).mean(0) - positive).mean()
    return Right(losses.mean(), scale_grad, losses[rows], slopes, regions_grad, texts_grad)


def agree_with_reference(inputs: Inputs, truth: Right) -> None:
    """All rows, in fp64. Raises AssertionError."""
    exact: Callable[..., Tensor] = functools.partial(region_contrastive_loss, backend="reference")
    leaves = [x.detach().double().requires_grad_() for x in inputs.plain]
    loss = exact(*leaves[:2], logit_scale=leaves[2], filter_threshold=inputs.threshold)
    regions_grad, texts_grad, scale_grad = torch.autograd.grad(loss, leaves)
    found = (truth.loss, truth.scale_grad, truth.regions_grad, truth.texts_grad)
    for name, one, other in zip(NAMES, found, (loss.detach(), scale_grad, regions_grad, texts_grad), strict=True):
        error = relative_error(one, other)
        assert error < 1e-9, f"the benchmark's truth is not the reference's: {name}, relative L2 error {error:.2g}"


def _panels(rows: Tensor, columns: int) -> Iterator[Tensor]:
    return iter(rows.split(max(1, PANEL // columns)))
