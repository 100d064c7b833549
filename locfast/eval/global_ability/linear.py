"""A linear classifier on frozen features, its L2 penalty or learning rate chosen on a part of the training split.

Validation images take no part in any choice: `fit` never sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.eval.global_ability.logistic import Fit, fit_logistic
from locfast.eval.global_ability.sgd import fit_sgd
from locfast.random import permute

SHARE = 10
"""One training image in so many chooses the hyper-parameter."""
L2 = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties l of mean cross entropy + l / 2 * |W|^2 (scikit-learn's C is 1 / (l * images))."""
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""Learning rates of DINOv2's linear evaluation, for batches of 256."""


@dataclass(frozen=True)
class Linear:
    """A classifier on standardised features, and how it was chosen."""

    weight: Tensor  # [K, C]
    bias: Tensor  # [K]
    mean: Tensor  # [C], of the training features
    std: Tensor  # [C]
    chosen: float
    """The penalty (lbfgs) or learning rate (sgd) that was best on the held-out tenth."""
    held_out: dict[float, float]
    """Accuracy on that tenth, by penalty or learning rate."""
    iterations: int
    """Of the refit on the whole training split."""
    converged: bool

    def predict(self, features: Tensor, chunk: int = 65536) -> Tensor:
        """features [M, C] -> classes [M] int64, on the CPU."""
        parts = []
        for some in features.split(chunk):
            x = (some.to(self.weight) - self.mean) / self.std
            parts.append((x @ self.weight.T + self.bias).argmax(-1).cpu())
        return torch.cat(parts)

    @property
    def at_edge(self) -> bool:
        """Whether the smallest or the largest value that was tried was better than all others."""
        others = [share for value, share in self.held_out.items() if value != self.chosen]
        ends = (min(self.held_out), max(self.held_out))
        return bool(others) and self.chosen in ends and self.held_out[self.chosen] > max(others)


def check_enough(count: int) -> None:
    """Raise UserError where `count` training images are too few to hold out a tenth."""
    if count < SHARE:
        raise UserError(
            f"a linear classifier was asked for on {count} training images. A tenth of them chooses its "
            f"hyper-parameter, so it needs at least {SHARE}; kNN needs fewer."
        )


def hold_out_tenth(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Places of the images to fit and of those to choose by, both sorted; classes keep their shares.

    Raises UserError where there are fewer than ten images.
    """
    count = len(labels)
    check_enough(count)
    shuffled = permute(torch.arange(count), count, seed, 0, "evaluate.held_out").argsort()
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[by_class[SHARE // 2 :: SHARE]] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    solver: str = "lbfgs",
    values: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    epochs: int = 10,
    batch_size: int = 1024,
    max_iterations: int = 1000,
) -> Linear:
    """Sweep `values` on nine tenths of the training split, choose by the other tenth, and fit the whole of it again.

    features [N, C], labels [N] int64. solver: lbfgs sweeps L2 penalties, sgd learning rates (all in one pass over the
    features). Of equally good values the largest penalty, or the smallest rate, is taken. The same bits for the same
    seed on a CPU. Raises UserError for too few images.
    """
    used, held = hold_out_tenth(labels, seed)
    swept: Callable[[Tensor, Tensor, Sequence[float]], list[Fit]]
    if solver == "lbfgs":
        values = sorted(values or L2, reverse=True)

        def swept(x: Tensor, y: Tensor, some: Sequence[float]) -> list[Fit]:
            return fit_logistic(x, y, num_classes, some, max_iterations)
    else:
        values = sorted(values or RATES)

        def swept(x: Tensor, y: Tensor, some: Sequence[float]) -> list[Fit]:
            return fit_sgd(x, y, num_classes, some, epochs=epochs, batch_size=batch_size, seed=seed)

    held_out = {}
    mean, std = statistics(features[used])
    x, y = standardised(features[used], mean, std, device), labels[used].to(device)
    for value, made in zip(values, swept(x, y, values), strict=True):
        judged = Linear(made.weight, made.bias, mean.to(x), std.to(x), value, {}, made.iterations, made.converged)
        finite = bool(made.weight.isfinite().all())
        right = judged.predict(features[held]) == labels[held]
        held_out[value] = right.double().mean().item() if finite else 0.0
    del x
    chosen = max(values, key=held_out.__getitem__)  # the first of equals
    mean, std = statistics(features)
    x = standardised(features, mean, std, device)
    made = swept(x, labels.to(device), [chosen])[0]
    return Linear(made.weight, made.bias, mean.to(x), std.to(x), chosen, held_out, made.iterations, made.converged)


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every feature, in fp64; a feature that never changes has the deviation 1."""
    std, mean = torch.std_mean(features.double(), dim=0, correction=0)
    return mean, torch.where(std > 0, std, torch.ones_like(std))


def standardised(features: Tensor, mean: Tensor, std: Tensor, device: torch.device | str) -> Tensor:
    """In the dtype of `features`, on `device`."""
    features = features.to(device)
    return (features - mean.to(features)) / std.to(features)
