"""Multinomial logistic regression by L-BFGS on the full batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 65536
"""Images whose logits are held at a time: 0.26 GB for 1000 classes."""
TOLERANCE = 1e-6
"""The largest element of the gradient at which a fit ends; or a thousandth of it as the change of the loss, which is
below what fp32 resolves."""
CONVERGED = 1e-4
"""The largest element of the gradient of a fit that counts as converged: scikit-learn's default."""


@dataclass(frozen=True)
class Fit:
    """weight [K, C], bias [K], on the features' device."""

    weight: Tensor
    bias: Tensor
    iterations: int
    converged: bool


@torch.no_grad()
def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalties: Sequence[float],
    max_iterations: int = 1000,
    tolerance: float = TOLERANCE,
) -> list[Fit]:
    """Minimise mean cross entropy + penalty / 2 * |weight|^2, for each penalty, each begun where the last ended.

    features [N, C] fp32 or fp64, standardised, labels [N] int64. The bias is not penalised.
    """
    weight = features.new_zeros(num_classes, features.shape[1])
    bias = features.new_zeros(num_classes)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    fits = []
    for penalty in penalties:
        solver = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=tolerance / 1000,
            history_size=10,
            line_search_fn="strong_wolfe",
        )
        evaluate = _Objective(features, labels, weight, bias, penalty)
        solver.step(evaluate)
        iterations = next(iter(solver.state.values()))["n_iter"]
        evaluate()
        assert weight.grad is not None and bias.grad is not None
        steepest = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
        fits.append(Fit(weight.clone(), bias.clone(), iterations, steepest <= CONVERGED))
    return fits


class _Objective:
    """The loss, and its gradient into weight.grad and bias.grad; by hand, so that logits need not be kept."""

    def __init__(self, features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> None:
        self.features, self.labels, self.penalty = features, labels, penalty
        self.weight, self.bias = weight, bias

    def __call__(self) -> Tensor:
        weight, bias, count = self.weight, self.bias, len(self.features)
        loss = weight.new_zeros((), dtype=torch.float64)
        to_weight, to_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for x, y in zip(self.features.split(ROWS), self.labels.split(ROWS), strict=True):
            log_share = F.log_softmax(x @ weight.T + bias, dim=-1)
            loss -= log_share.gather(1, y[:, None]).double().sum()
            error = log_share.exp()
            error[torch.arange(len(y), device=y.device), y] -= 1
            to_weight += error.T @ x
            to_bias += error.sum(0)
        weight.grad = to_weight / count + self.penalty * weight
        bias.grad = to_bias / count
        return loss / count + self.penalty / 2 * weight.double().square().sum()
