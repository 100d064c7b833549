"""UTA's embedded demo: a new ViT learns the demo teacher's tokens, beside the same ViT trained by masked prediction.

`python -m locfast.train --method uta` with no other flag comes here; recipes/demo_uta.yaml holds its settings. The
second student is trained as MIM (UTA, table 6) until it has spent as many FLOPs as the first one. All is the ordinary
machinery, on scenes instead of photographs; class prototypes stand for a text tower.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from locfast.config.base import TrainConfig
from locfast.config.registry import method_config
from locfast.data.scenes import CLASSES, MAX_OBJECTS, present_classes, render_scenes, scene_keys
from locfast.demo.figures import Figure, check_out, finish
from locfast.demo.run import DemoProbe
from locfast.engine.precision import pick_device
from locfast.engine.run import train
from locfast.engine.run_folder import load_method
from locfast.eval.features import backbone_features
from locfast.eval.probe import ProbeConfig, probe
from locfast.methods import create_method
from locfast.methods.uta import UTA
from locfast.models.joint import JointTower

PROTOTYPE_STREAM, TEST_STREAM = 20_000, 30_000
"""Scenes that prototypes are made of, and those that students are judged on, come from these streams + seed."""


@dataclass(frozen=True)
class Settings:
    """How much the demo measures with."""

    prototypes: int = 1200
    test: int = 2048
    probe: DemoProbe = field(
        default_factory=lambda: DemoProbe(
            heads=ProbeConfig(heads=("linear",), tasks=("local",), batch_size=64, patience=2)
        )
    )


def run_demo(config: TrainConfig, settings: Settings | None = None) -> Path:
    """Train a student by UTA and one by MIM, measure both and the teacher into RUN/demo.json. Gives the run folder."""
    settings = settings or Settings()
    out = check_out(config)
    console, begin = Console(), time.monotonic()
    device = pick_device(config.device)
    ratio = flops_ratio(config)
    path = train(config)
    spent = time.monotonic() - begin
    masked = with_objective(config, "mim")
    steps = max(1, round((config.steps or 1) * ratio))
    console.print(f"Now the same student by masked prediction, for as many of its FLOPs: {steps} steps.")
    baseline = train(dataclasses.replace(masked, steps=steps, out=str(out / "mim")))
    seconds = {"uta": round(spent, 1), "mim": round(time.monotonic() - begin - spent, 1)}

    console.print("Measuring both, and the teacher.")
    ours, theirs = load_method(path).to(device), load_method(baseline).to(device)
    assert isinstance(ours, UTA) and isinstance(theirs, UTA) and isinstance(ours.teacher, JointTower)
    towers = {"teacher": ours.teacher, "mim": theirs.student, "uta": ours.student}
    found = measure(towers, config.seed, settings, device)
    figures = [
        Figure(name, found["mim"][name], found["uta"][name], found["teacher"].get(name)) for name in found["uta"]
    ]
    told = {"steps": {"uta": config.steps, "mim": steps}, "student_flops_of_uta_over_mim": ratio, "seconds": seconds}
    return finish(path, config, console, figures, ("MIM", "UTA", "teacher"), told, time.monotonic() - begin)


def with_objective(config: TrainConfig, objective: str) -> TrainConfig:
    """The same run by another objective of UTA's."""
    own: Any = method_config(config)
    changed: dict[str, Any] = {"uta": dataclasses.replace(own, objective=objective)}
    return dataclasses.replace(config, **changed)


def flops_ratio(config: TrainConfig) -> float:
    """FLOPs of the student's step by UTA over those by MIM, counted operation by operation on one image."""
    flops = []
    for objective in ("uta", "mim"):
        fields = method_config(with_objective(config, objective))
        method = create_method(config.method, fields, model=config.model, image_size=config.image_size)
        assert isinstance(method, UTA)
        flops.append(method.student_flops())
    return flops[0] / flops[1]


@torch.no_grad()
def measure(
    towers: dict[str, JointTower], seed: int, settings: Settings, device: torch.device
) -> dict[str, dict[str, float]]:
    """By tower: how far its tokens agree with the teacher's, what its CLS token names, what its patches tell."""
    teacher = towers["teacher"]

    def scenes(stream: int, count: int, objects: int) -> tuple[Tensor, Tensor]:
        images, maps = render_scenes(scene_keys(stream + seed, 0, count, device), objects)
        mean, std = (torch.tensor(side, device=device).view(3, 1, 1) for side in (teacher.mean, teacher.std))
        return (images.float() / 255 - mean) / std, present_classes(maps)

    def tokens(tower: JointTower, images: Tensor) -> Tensor:
        return torch.cat([tower(some) for some in images.split(256)])

    examples, present = scenes(PROTOTYPE_STREAM, settings.prototypes, 1)
    prototypes = class_prototypes(tokens(teacher, examples)[:, 0], present)
    images, present = scenes(TEST_STREAM, settings.test, MAX_OBJECTS)
    target = tokens(teacher, images)
    splits = settings.probe.splits(seed, teacher.image_size)
    found = {}
    for name, tower in towers.items():
        mine = tokens(tower, images)
        with torch.enable_grad():
            backbone = tower.backbone
            heads = probe(
                backbone_features(backbone, None), splits, len(CLASSES), backbone.patch_size, backbone.num_heads,
                settings.probe.heads, device=device,
            )  # fmt: skip
        agreement = F.cosine_similarity(mine, target, dim=-1)
        found[name] = {
            "agreement of CLS": 100 * agreement[:, 0].mean().item(),
            "agreement of patches": 100 * agreement[:, 1:].mean().item(),
            "zero-shot": 100 * named(mine[:, 0], prototypes, present),
            "local recall, linear head": 100 * heads["local/linear"].test.recall,
        }
    return found


def class_prototypes(embeddings: Tensor, present: Tensor) -> Tensor:
    """The mean unit embedding of the scenes of every class: [M, E] and [M, K] bool, one class each -> [E, K]."""
    unit, one = F.normalize(embeddings, dim=-1), present & (present.sum(1, keepdim=True) == 1)
    return F.normalize(unit.T @ one.float(), dim=0)


def named(embeddings: Tensor, prototypes: Tensor, present: Tensor) -> float:
    """The share of the classes in sight that are among as many nearest prototypes: [M, E], [E, K], [M, K] bool."""
    likeness = F.normalize(embeddings, dim=-1) @ prototypes
    rank = likeness.argsort(1, descending=True).argsort(1)
    return ((rank < present.sum(1, keepdim=True)) & present).sum().item() / present.sum().item()
