"""The optimiser of timm's factory over a method's parameter groups, and its state as named tensors."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.optim import list_optimizers as timm_optimizers
from torch import Tensor, nn

from locfast.config.base import OptimConfig
from locfast.errors import UserError, suggest
from locfast.methods.base import Method

_GROUP = "group."
_HOW = ("fused", "foreach", "capturable", "differentiable")
"""Settings of a group that say how its update is computed: a resumed run keeps its own, of the device it runs on."""
FUSED = ("adam", "adamw")
FUSED_ON = ("cuda",)
"""Where these run as one kernel. On a CPU that rounds otherwise than the loops, to which its curves keep."""

LAMBS = ("lamb", "lambc", "lambw", "lambcw", "lambcd", "clamb", "clambw")
"""What timm calls its LAMB and the variants of it."""


def build_optimizer(method: Method, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The optimiser that `config` names. UserError for an unknown name or settings that it does not take."""
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps}
    if method.device.type in FUSED_ON and config.name.lower() in FUSED:
        options["fused"] = True
    known = [str(name) for name in timm_optimizers()]
    if config.name.lower() not in known:
        raise UserError(f"optim.name {config.name}: timm has no such optimiser{suggest(config.name, known) or '.'}")
    name, own = _lamb(config.name.lower(), method.device)
    try:
        return create_optimizer_v2(
            method.parameter_groups(), opt=name, lr=lr, weight_decay=config.weight_decay, **options, **own
        )
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise UserError(f"optim.name {config.name} does not take these settings: {error}") from error


def _lamb(name: str, device: torch.device) -> tuple[str, dict[str, Any]]:
    """NVIDIA apex's fused LAMB for the name lamb where it can run; and what keeps either LAMB from limiting gradients.

    Both hold their norm at or below 1 unless told otherwise, which is the loop's part for every optimiser.
    """
    if name == "lamb" and device.type in FUSED_ON and _apex_has_lamb():
        return "fusedlamb", {"max_grad_norm": torch.finfo(torch.float32).max}  # its kernel compares with a number
    return name, {"max_grad_norm": None} if name in LAMBS else {}


def _apex_has_lamb() -> bool:
    try:
        from apex.optimizers import FusedLAMB  # noqa: F401
    except ImportError:
        return False
    return True


def gate(optimizer: torch.optim.Optimizer, sound: Tensor) -> bool:
    """Let the next step change weights and state only where `sound`, a bool scalar on the device, is true.

    False where the optimiser cannot: only PyTorch's fused ones can, by what gradient scaling uses.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if not (fused and getattr(optimizer, "_step_supports_amp_scaling", False)):
        return False
    optimizer.found_inf = (~sound).float()  # type: ignore[attr-defined]
    return True


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, times the group's own `lr_scale` where a method gave one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def state_tensors(optimizer: torch.optim.Optimizer, method: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state: tensors as `KIND/PARAMETER NAME`, and everything else as plain values for JSON."""
    names = _names(optimizer, method)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, entries in state["state"].items():
        for kind, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"{kind}/{names[number]}"] = value
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(state["param_groups"]):  # LAMB counts its steps in a tensor of the group
        tensors |= {f"{_GROUP}{number}/{k}": v for k, v in group.items() if isinstance(v, Tensor)}
        groups.append({k: v for k, v in group.items() if k != "params" and not isinstance(v, Tensor)})
    return tensors, {"values": values, "groups": groups}


def load_state_tensors(
    optimizer: torch.optim.Optimizer, method: nn.Module, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """Put back what `state_tensors` gave."""
    numbers = {name: number for number, name in enumerate(_names(optimizer, method))}
    state: dict[int, dict[str, Any]] = {}
    groups = [
        {**now, **{k: tuple(v) if isinstance(now.get(k), tuple) else v for k, v in then.items() if k not in _HOW}}
        for now, then in zip(optimizer.state_dict()["param_groups"], plain["groups"], strict=True)
    ]
    for key, value in {**tensors, **plain["values"]}.items():
        kind, name = key.split("/", 1)
        if kind.startswith(_GROUP):
            groups[int(kind.removeprefix(_GROUP))][name] = value
        else:
            state.setdefault(numbers[name], {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names(optimizer: torch.optim.Optimizer, method: nn.Module) -> list[str]:
    """Parameter names in the order in which the optimiser numbers them."""
    by_id = {id(parameter): name for name, parameter in method.named_parameters()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
