"""A network that follows another is its exponential moving average, running statistics included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from locfast.models.momentum_encoder import MomentumCopy, momentum_at
from locfast.models.projection_head import ProjectionHead


def test_after_k_steps_it_is_the_closed_form_and_so_are_its_running_statistics() -> None:
    """m^k of the start, and (1 - m) m^(k - i) of step i."""
    head, momentum, steps = ProjectionHead(6, 10).double(), 0.9, 12
    copy = MomentumCopy({"head": head})
    moving = {k: v.clone() for k, v in head.state_dict().items()}
    history = []
    for step in range(steps):
        with torch.no_grad():
            head(torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
            for parameter in head.parameters():
                parameter += torch.randn(
                    parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
                )
        history.append({k: v.clone() for k, v in head.state_dict().items()})
        copy.follow({"head": head}, momentum)
    for name, start in moving.items():
        found = copy.state_dict()[f"head.{name}"]
        if not start.is_floating_point():
            assert found == history[-1][name] == steps  # batch norm's counter
            continue
        parts = [(1 - momentum) * momentum ** (steps - 1 - i) * then[name] for i, then in enumerate(history)]
        torch.testing.assert_close(found, momentum**steps * start + sum(parts), rtol=1e-12, atol=1e-12, msg=name)
        assert not torch.equal(found, start)
    assert {"head.norm.running_mean", "head.norm.running_var"} < set(copy.state_dict())


def test_it_stays_frozen_and_in_eval_mode_and_shares_no_memory() -> None:
    head = ProjectionHead(4, 5)
    copy = nn.ModuleDict({"momentum": MomentumCopy({"head": head})}).train()
    assert not any(module.training for module in copy["momentum"].modules())
    assert not any(p.requires_grad for p in copy.parameters())
    before = {k: v.clone() for k, v in copy.state_dict().items()}
    head(torch.randn(3, 4)).sum().backward()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 1
    assert all(torch.equal(before[k], v) for k, v in copy.state_dict().items())
    copy["momentum"].get_submodule("head")(torch.randn(1, 4))  # one row: its own statistics are not asked for
    assert all(torch.equal(before[k], v) for k, v in copy.state_dict().items())


def test_a_momentum_of_one_stands_still_and_of_zero_copies() -> None:
    head, other = nn.Linear(3, 3), nn.Linear(3, 3)
    copy = MomentumCopy({"head": head})
    copy.follow({"head": other}, 1.0)
    assert torch.equal(copy.get_submodule("head").weight, head.weight)
    copy.follow({"head": other}, 0.0)
    assert torch.equal(copy.get_submodule("head").weight, other.weight)


def test_momentum_follows_half_a_cosine_or_stays() -> None:
    assert [momentum_at(step, 100, 0.996, 0.996) for step in (1, 50, 100)] == [0.996] * 3
    assert momentum_at(1, 100, 0.996, 1.0) == pytest.approx(0.996)
    assert momentum_at(51, 100, 0.996, 1.0) == pytest.approx(0.998)
    assert 0.99999 < momentum_at(100, 100, 0.996, 1.0) < 1
