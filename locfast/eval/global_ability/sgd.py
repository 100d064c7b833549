"""Linear classifiers by SGD, one for every learning rate, trained together: a batch is read once for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from locfast.eval.global_ability.logistic import Fit
from locfast.random import permute

MOMENTUM = 0.9


@torch.no_grad()
def fit_sgd(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    rates: Sequence[float],
    *,
    epochs: int = 10,
    batch_size: int = 1024,
    seed: int = 0,
) -> list[Fit]:
    """Cross entropy with momentum 0.9, no weight decay, and a cosine to zero, as DINOv2's linear evaluation.

    features [N, C], standardised, labels [N] int64 -> one Fit a rate. rates are for batches of 256 and scale with the
    batch. Every epoch has an order of its own, drawn from `seed`; a last batch may be smaller.
    """
    count, batch_size = len(features), min(batch_size, len(features))
    steps = epochs * -(-count // batch_size)
    largest = torch.tensor(rates, device=features.device, dtype=features.dtype) * batch_size / 256
    weight = features.new_zeros(len(rates), num_classes, features.shape[1])
    bias = features.new_zeros(len(rates), num_classes)
    speed = torch.zeros_like(weight), torch.zeros_like(bias)
    step = 0
    for epoch in range(epochs):
        order = permute(torch.arange(count), count, seed, epoch, "evaluate.sgd").to(features.device)
        for rows in order.split(batch_size):
            x, y = features[rows], labels[rows]
            error = (torch.einsum("bc,lkc->lbk", x, weight) + bias[:, None]).softmax(-1)
            error[:, torch.arange(len(y), device=y.device), y] -= 1
            gradient = torch.einsum("lbk,bc->lkc", error, x) / len(y), error.mean(1)
            rate = largest * (1 + math.cos(math.pi * step / steps)) / 2
            for value, velocity, slope in zip((weight, bias), speed, gradient, strict=True):
                velocity.mul_(MOMENTUM).add_(slope)
                value -= rate.view(-1, *[1] * (value.ndim - 1)) * velocity
            step += 1
    return [Fit(weight[i].clone(), bias[i].clone(), steps, True) for i in range(len(rates))]
