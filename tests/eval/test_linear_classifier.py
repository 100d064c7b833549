"""The linear classifier is scikit-learn's, and nothing but training images chooses it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from locfast.errors import UserError
from locfast.eval.global_ability import linear
from locfast.eval.global_ability.linear import fit, hold_out_tenth, standardised, statistics
from locfast.eval.global_ability.logistic import fit_logistic
from locfast.eval.global_ability.sgd import fit_sgd
from tests.eval.test_knn import clusters


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take ten times as long when two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_logistic_regression_equals_scikit_learns(penalty: float) -> None:
    models = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(400)
    features = features.double()
    judge = models.LogisticRegression(C=1 / (penalty * 400), solver="newton-cholesky", tol=1e-12).fit(features, labels)
    # begun where a stronger penalty ended
    ours = fit_logistic(features, labels, 4, [10.0, penalty], tolerance=1e-10)[-1]
    # a loss 1e-12 above its minimum leaves weights 5e-5 off where the curvature is the penalty alone, 1e-3: half of it
    # times the square; steps end where they change it by 1e-13
    torch.testing.assert_close(ours.weight, torch.from_numpy(judge.coef_), rtol=0, atol=5e-5)
    torch.testing.assert_close(
        (features @ ours.weight.T + ours.bias).softmax(-1),
        torch.from_numpy(judge.predict_proba(features)),
        rtol=0,
        atol=5e-5,
    )
    assert ours.converged


def test_gradient_by_hand_is_that_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    from locfast.eval.global_ability import logistic

    monkeypatch.setattr(logistic, "ROWS", 7)
    features, labels = clusters(50)
    features = features.double()
    weight, bias = torch.randn(4, 12, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    loss = logistic._Objective(features, labels, weight, bias, 0.3)()
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    expected = F.cross_entropy(features @ w.T + b, labels) + 0.15 * w.square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(weight.grad, w.grad)
    torch.testing.assert_close(bias.grad, b.grad)


def test_rates_trained_together_equal_each_alone_by_torchs_sgd() -> None:
    features, labels = clusters(70)
    features, rates = features.double(), [0.01, 0.3]
    together = fit_sgd(features, labels, 4, rates, epochs=2, batch_size=32, seed=5)
    from locfast.random import permute

    for rate, fitted in zip(rates, together, strict=True):
        model = torch.nn.Linear(12, 4, dtype=torch.float64)
        torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        solver = torch.optim.SGD(model.parameters(), lr=rate * 32 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, 6)
        for epoch in range(2):
            for rows in permute(torch.arange(70), 70, 5, epoch, "evaluate.sgd").split(32):
                solver.zero_grad()
                F.cross_entropy(model(features[rows]), labels[rows]).backward()
                solver.step()
                schedule.step()
        torch.testing.assert_close(fitted.weight, model.weight.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fitted.bias, model.bias.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_choice_is_made_on_a_held_out_tenth_of_the_training_split(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sweep is fitted on, what judges it, and what is fitted in the end are exactly these images."""
    features, labels = clusters(200)
    used, held = hold_out_tenth(labels, 3)
    fitted, judged = [], []
    name = "fit_logistic" if solver == "lbfgs" else "fit_sgd"
    real, predict = getattr(linear, name), linear.Linear.predict

    def spied(x: Tensor, *args: object, **kwargs: object) -> object:
        fitted.append(x)
        return real(x, *args, **kwargs)

    def noted(self: linear.Linear, x: Tensor) -> Tensor:
        judged.append(x)
        return predict(self, x)

    monkeypatch.setattr(linear, name, spied)
    monkeypatch.setattr(linear.Linear, "predict", noted)
    made = fit(features, labels, 4, solver=solver, values=[0.01, 1.0], seed=3)
    sweep, refit = fitted
    torch.testing.assert_close(sweep, standardised(features[used], *statistics(features[used]), "cpu"))
    torch.testing.assert_close(refit, standardised(features, *statistics(features), "cpu"))
    assert [x.equal(features[held]) for x in judged] == [True, True]
    assert made.held_out[made.chosen] == max(made.held_out.values())


def test_spoilt_held_out_labels_change_the_choice() -> None:
    """The choice follows the held-out tenth: labels that only the strongest penalty gets right there win."""
    features, labels = clusters(300)
    labels = torch.where(torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.5, 0, labels)
    _, held = hold_out_tenth(labels, 0)
    plain = fit(features, labels, 4, values=[1e-3, 100.0])
    spoilt = labels.clone()
    spoilt[held] = 0  # the commonest class, which is all that a classifier with no weights ever says
    # the split depends on the labels' order within classes, so it is held fixed here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "hold_out_tenth", lambda *_: (_rest(held, 300), held))
        led = fit(features, spoilt, 4, values=[1e-3, 100.0])
    assert plain.chosen == 1e-3 and led.chosen == 100.0 and led.held_out[100.0] == 1.0


def _rest(held: Tensor, count: int) -> Tensor:
    return torch.tensor([i for i in range(count) if i not in set(held.tolist())])


def test_held_out_tenth_keeps_the_shares_of_classes_and_follows_the_seed() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 50)
    used, held = hold_out_tenth(labels, 0)
    assert sorted([*used.tolist(), *held.tolist()]) == list(range(200))
    assert torch.bincount(labels[held]).tolist() == [10, 5, 5]
    assert hold_out_tenth(labels, 0)[1].equal(held) and not hold_out_tenth(labels, 1)[1].equal(held)
    with pytest.raises(UserError, match="9 training images"):
        hold_out_tenth(torch.arange(9), 0)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_same_seed_same_classifier_and_scale_of_features_does_not_matter(solver: str) -> None:
    features, labels = clusters(200)
    values = [1e-3, 0.1]
    first, again = (fit(features, labels, 4, solver=solver, values=values, seed=1) for _ in range(2))
    assert first.weight.equal(again.weight) and first.held_out == again.held_out
    queries, truth = clusters(300, seed=2)
    scale = torch.logspace(-3, 3, 12)
    other = fit(features * scale + 5, labels, 4, solver=solver, values=values, seed=1)
    # rounding of features this uneven moves no more than a query in a hundred across a boundary
    assert (first.predict(queries) != other.predict(queries * scale + 5)).double().mean() <= 0.01
    assert (first.predict(queries) == truth).double().mean() > 0.6  # of four classes


def test_feature_that_never_changes_and_a_rate_that_diverges_do_no_harm() -> None:
    features, labels = clusters(200)
    features[:, 3] = 7.0
    made = fit(features, labels, 4, solver="sgd", values=[0.1, 1e30])
    assert made.chosen == 0.1 and made.weight.isfinite().all()
