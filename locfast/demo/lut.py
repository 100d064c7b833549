"""LUT's embedded demo: a ViT that learns from scenes without any label, beside the same ViT by plain MAE.

`python -m locfast.train --method lut` with no other flag comes here; recipes/demo_lut.yaml holds its settings. MAE,
which is LUT without its context loss, gets as much time as LUT: what a step of either takes is measured first, in
turns, and MAE takes as many more steps. Then linear heads tell what the frozen features of both know, and those of
random weights.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from locfast.config.base import TrainConfig
from locfast.config.registry import method_config
from locfast.data.scenes import CLASSES, SIZE
from locfast.demo.figures import Figure, check_out, finish
from locfast.demo.run import DemoProbe
from locfast.engine.precision import pick_device
from locfast.engine.run import train
from locfast.engine.run_folder import load_method
from locfast.eval.features import Labelled, backbone_features
from locfast.eval.probe import ProbeConfig, probe
from locfast.methods import create_method
from locfast.models.backbone import Backbone
from locfast.random import Keys

NAMES = {"local/linear": "local recall, linear head", "global/linear": "image-level recall, linear head"}


@dataclass(frozen=True)
class Settings:
    """How much the demo measures with."""

    timed_steps: int = 9
    """Steps of either method that are timed, after one that warms up."""
    probe: DemoProbe = field(
        default_factory=lambda: DemoProbe(heads=ProbeConfig(heads=("linear",), batch_size=64, patience=2))
    )


def run_demo(config: TrainConfig, settings: Settings | None = None) -> Path:
    """Train by LUT, then by MAE for as long, probe both; write RUN/demo.json. Gives the run folder."""
    settings = settings or Settings()
    out = check_out(config)
    console, begin = Console(), time.monotonic()
    device = pick_device(config.device)
    plain = without_context(config)
    longer = step_ratio(config, plain, settings.timed_steps, device)
    started = time.monotonic()
    path = train(config)
    halfway = time.monotonic()
    steps = max(1, round((config.steps or 1) * longer))
    console.print(f"A step of LUT takes {longer:.2f} times MAE's: now {steps} steps of MAE.")
    baseline = train(dataclasses.replace(plain, steps=steps, out=str(out / "mae")))
    seconds = {"lut": round(halfway - started, 1), "mae": round(time.monotonic() - halfway, 1)}

    console.print("Probing both, and the same ViT with random weights.")
    fresh = create_method(config.method, method_config(config), model=config.model, seed=config.seed)
    networks = {
        "random": fresh.artifacts()["backbone"],
        "mae": load_method(baseline).artifacts()["backbone"],
        "lut": load_method(path).artifacts()["backbone"],
    }
    splits = settings.probe.splits(config.seed, networks["lut"].image_size)
    found = {name: recall(network.to(device).eval(), splits, settings, device) for name, network in networks.items()}
    figures = [Figure(told, *(found[who][key] for who in ("mae", "lut", "random"))) for key, told in NAMES.items()]
    more = {"steps": {"lut": config.steps, "mae": steps}, "step_of_lut_over_mae": longer, "seconds": seconds}
    return finish(path, config, console, figures, ("MAE", "LUT", "random weights"), more, time.monotonic() - begin)


def recall(
    backbone: Backbone, splits: dict[str, Labelled], settings: Settings, device: torch.device
) -> dict[str, float]:
    """Macro recall in percent of every linear head on frozen features."""
    heads = settings.probe.heads
    features = backbone_features(backbone, None)
    probed = probe(features, splits, len(CLASSES), backbone.patch_size, backbone.num_heads, heads, device=device)
    return {name: 100 * one.test.recall for name, one in probed.items()}


def without_context(config: TrainConfig) -> TrainConfig:
    """The same run as masked autoencoding alone."""
    own: Any = method_config(config)
    changed: dict[str, Any] = {config.method: dataclasses.replace(own, context_weight=0.0)}
    return dataclasses.replace(config, **changed)


def step_ratio(config: TrainConfig, plain: TrainConfig, steps: int, device: torch.device) -> float:
    """How much longer a forward and backward pass of LUT takes than MAE's: the median over pairs measured in turns."""
    batch = config.micro_batch or config.batch_size or 1
    index = torch.arange(batch, device=device)
    views = {name: torch.randn(batch, 3, SIZE, SIZE, device=device) for name in ("image", "context")}

    def once(method: Any) -> float:
        start = time.perf_counter()
        draw = method.draw(Keys(0, torch.zeros_like(index), index))
        method({"views": views}, draw)["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    methods = [create_method(c.method, method_config(c), model=c.model).to(device) for c in (config, plain)]
    pairs = [[once(method) for method in methods] for _ in range(1 + steps)][1:]
    return statistics.median(ours / theirs for ours, theirs in pairs)
