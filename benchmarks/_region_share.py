"""What one of CLOC's 64 ranks computes, on one GPU alone: 2048 regions against 131072 texts in 64 blocks.

The texts and all that other ranks would tell lie in memory, so that nothing travels: every kernel and launch of the
loss runs as in a group, without the wire. Own gradients of regions, and sums, are held to those of the whole batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from unittest import mock

import torch
from _attention_check import relative_error
from _harness import Bench
from _region_check import DTYPE, Inputs, Shape
from _region_cost import Setting, kept, peak
from _region_plan import BATCH, GPUS, PER_IMAGE, WIDTHS
from torch import Tensor

from locfast.kernels import _backend
from locfast.kernels.region_contrastive_loss import OP, ops
from locfast.kernels.region_contrastive_loss.exchange import Alone

THRESHOLD = 0.9
WRONG = 2**-6
"""Relative L2 error above which a result is refused: bf16's weights and gradients, rounded at other places, err by 2^-9
to 2^-8, and a block that is left out of 64, or counted twice, by more than 2^-6."""


class Share(Alone):
    """The first of `size` ranks, to whom all others have told everything before it asks."""

    def __init__(self, texts: Tensor, facts: Tensor, columns: Tensor):
        """texts [size, R, E] unit rows; facts [size, 2, R]: positives, valid; columns [size, R]: log2 of their sums."""
        self.size, self._texts, self._facts, self._columns = len(texts), texts, facts, columns
        self._came = torch.zeros(texts.shape[1:], device=texts.device)

    def blocks(self, texts: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield 0, texts
        for step in range(1, self.size):
            yield self.size - step, self._texts[self.size - step]

    def give(self, owner: int, grad: Tensor) -> None:
        """A share that came in is added, as in a ring: here zeros."""
        grad += self._came
        self._total = grad

    def all(self, own: Tensor) -> Tensor:
        return self._facts.clone()

    def max(self, values: Tensor) -> Tensor:
        return self._columns.clone()

    def sum(self, values: Tensor) -> Tensor:
        """Of the sums by column that which makes them the whole's; of the loss this rank's share."""
        return values.fill_(1) if values.ndim else values


class Case:
    """A whole batch, and a first rank's share of it."""

    def __init__(self, ranks: int, rows: int, width: int, device: torch.device):
        self.ranks, self.rows = ranks, rows
        inputs = Inputs(Shape(ranks * rows, width), device)
        regions, texts, self.scale = inputs.plain
        self.backend = _backend.choose(OP, device, DTYPE, "auto")
        valid = torch.ones(len(regions), dtype=torch.bool, device=device)
        self.arguments = (THRESHOLD, DTYPE, "", "ring", True, self.backend)
        leaf = regions.detach().requires_grad_()
        with torch.enable_grad():
            loss, _, units, _, by_row, columns, *_ = ops.forward_op(
                leaf, texts, self.scale, None, valid, *self.arguments
            )
            (grad,) = torch.autograd.grad(loss, leaf)
        cosines = ops._kernels(self.backend).prepare(regions, texts, valid, DTYPE)[3]
        positives = ops.LOG2E * cosines.double() * self.scale.double()
        facts = torch.stack([positives, valid.double()]).unflatten(1, (ranks, rows)).transpose(0, 1).contiguous()
        # The sums over a column's negatives: the whole's without its positive, which the loss adds to them.
        negatives = columns[0, 0] + torch.log2(-torch.expm1((positives - columns[0, 0]) / ops.LOG2E))
        self.share = Share(units.unflatten(0, (ranks, rows)), facts, negatives.unflatten(0, (ranks, rows)))
        self.leaves = tuple(x[:rows].detach().clone().requires_grad_() for x in (regions, texts))
        self.valid = valid[:rows]
        self.wanted = (by_row[0, :rows].clone(), grad[:rows].clone())

    def forward(self) -> tuple[Tensor, ...]:
        with mock.patch.object(ops, "_ranks", lambda *asked: self.share):
            return ops.forward_op(*self.leaves, self.scale, None, self.valid, *self.arguments)

    def both(self) -> tuple[Tensor, ...]:
        """Sums by row, gradients of regions, and this rank's own shares of those of its texts."""
        with mock.patch.object(ops, "_ranks", lambda *asked: self.share):
            loss, *facts = ops.forward_op(*self.leaves, self.scale, None, self.valid, *self.arguments)
            return facts[3][0], *torch.autograd.grad(loss, self.leaves)

    def check(self) -> None:
        """Raises AssertionError where sums or gradients are not the whole batch's."""
        sums, grad, _ = self.both()
        assert (sums - self.wanted[0]).abs().max().item() < 1e-3, "sums by row are not the whole batch's"
        error = relative_error(grad, self.wanted[1])
        assert error < WRONG, f"gradients of regions: relative L2 error {error:.1e}, {WRONG:.1e} allowed"


def main(args: argparse.Namespace) -> None:
    bench = Bench("region_share", [OP], args)
    ranks, rows, widths = (4, 256, [64]) if bench.smoke else (GPUS, BATCH * PER_IMAGE // GPUS, list(WIDTHS.values()))
    for width in widths:
        case = Case(ranks, rows, width, bench.device)
        at = Setting(ranks, rows, width, backend=case.backend)
        name = f"1 of {ranks} ranks, R {rows} each, E {width}, bf16"
        told = {"forward": sum(kept(at).values()), "both": peak(at)}
        for direction, run, flops in (("forward", case.forward, at.flops * 2 // 5), ("both", case.both, at.flops)):

            def check(
                case: Case = case, note: str = f"in a group {told[direction] / 2**20:.1f} MiB, worked out"
            ) -> str:
                case.check()
                return note

            shape = {"ranks": ranks, "R": rows, "E": width}
            who = f"locfast {case.backend}"
            bench.measure(name, direction, who, run, check, amount=flops, unit="TFLOP/s", shape=shape)
    bench.finish()
