"""LAMB: which one is taken, what limits its gradients, and that a run with it is resumed as it was."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from timm.optim.lamb import Lamb
from torch import nn

from locfast.config.base import OptimConfig
from locfast.engine import optim
from locfast.engine.optim import build_optimizer, gate
from locfast.engine.run import train
from tests.engine.toy import ToyConfig, losses, toy_config


@pytest.fixture
def apex(monkeypatch) -> None:
    """The names that NVIDIA apex has, with nothing behind them."""
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedLAMB = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def asked(monkeypatch, name: str, device: str) -> tuple[str, Any]:
    """What timm's factory is asked for: name and norm limit."""
    taken: dict[str, Any] = {}
    monkeypatch.setattr(optim, "create_optimizer_v2", lambda groups, **settings: taken.update(settings))
    method: Any = SimpleNamespace(device=torch.device(device), parameter_groups=list)
    build_optimizer(method, OptimConfig(name=name), lr=1e-3)
    return taken["opt"], taken.get("max_grad_norm", "its own")


def test_apex_has_the_say_on_a_gpu_where_it_is_installed(apex, monkeypatch):
    name, limit = asked(monkeypatch, "lamb", "cuda")
    assert name == "fusedlamb" and limit > 1e38
    assert asked(monkeypatch, "lamb", "cpu") == ("lamb", None)


def test_timms_lamb_is_taken_where_apex_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    assert asked(monkeypatch, "lamb", "cuda") == ("lamb", None)
    assert asked(monkeypatch, "LAMB", "cpu") == ("lamb", None)
    assert asked(monkeypatch, "adamw", "cuda")[1] == "its own"


class One(nn.Module):
    """A method of one weight."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.weight], "weight_decay": 0.1, "lr_scale": 0.5}]


@pytest.mark.parametrize("name", optim.LAMBS)
def test_lambs_first_moment_is_that_of_the_whole_gradient(name):
    method: Any = One()
    optimizer = build_optimizer(method, OptimConfig(name=name, clip=None, betas=(0.9, 0.99)), lr=1e-3)
    method.weight.grad = torch.full((4, 4), 50.0)
    optimizer.step()
    assert optimizer.state[method.weight]["exp_avg"].max().item() == pytest.approx(5.0)
    assert not gate(optimizer, torch.tensor(True))


def test_a_run_with_lamb_resumed_repeats_the_curve_bit_for_bit(images, tmp_path):
    settings: dict[str, Any] = {"toy": ToyConfig(optim=OptimConfig(name="lamb", decay_all=False)), "save_every": 4}
    whole = losses(train(toy_config(images, tmp_path / "whole", steps=12, **settings)))
    run = train(toy_config(images, tmp_path / "run", steps=12, **settings))
    for newer in ("step-00000008", "step-00000012"):
        for file in (run / "checkpoints" / newer).iterdir():
            file.unlink()
        (run / "checkpoints" / newer).rmdir()
    train(toy_config(images, run, steps=12, resume=True, **settings))
    assert losses(run) == whole
    assert "step-00000004, after step 4" in (run / "train.log").read_text()
    assert f"optimiser: {Lamb.__module__}.Lamb" in (run / "train.log").read_text()
