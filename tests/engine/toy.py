"""A method small enough that hundreds of steps take a second: what the engine's tests train.

A student sees masked pixels and matches a frozen teacher that sees them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from locfast.config import registry
from locfast.config.base import MethodConfig, TrainConfig
from locfast.data.spec import ImageSpec, View
from locfast.methods.base import Batch, Method
from locfast.random import Keys, uniform

registry.METHODS["toy"] = (f"{__name__}:ToyConfig", f"{__name__}:Toy")

SIDE = 8
MODELS = {"small": 16, "large": 24}


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MethodConfig):
    execution = ("pieces",)

    pieces: int = 1
    """Says how, not what: nothing depends on it."""
    dropout: float = 0.0
    poison: int | None = None
    """Index of an image whose loss is NaN."""
    poison_gradient: bool = False
    """The poisoned image gives a finite loss with a gradient that is not."""


class Toy(Method):
    preparation_samples = 16

    def __init__(
        self, config: ToyConfig, *, model: str, pretrained: bool = True, image_size: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.config, self.optim = config, config.optim
        width = MODELS[model]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + pretrained)  # "pretrained" weights differ from fresh ones
            self.teacher = nn.Linear(3 * SIDE * SIDE, 8).requires_grad_(False)
            torch.manual_seed(seed)
            self.student = nn.Sequential(
                nn.Linear(3 * SIDE * SIDE, width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(width, 8)
            )
        self.register_buffer("scale", torch.ones(()))

    def image_spec(self) -> ImageSpec:
        half = (0.5, 0.5, 0.5)
        return ImageSpec({"image": View(size=(SIDE, SIDE), mean=half, std=half, crop="random_resized", flip=True)})

    def validation_spec(self) -> ImageSpec:
        half = (0.5, 0.5, 0.5)
        return ImageSpec({"image": View(size=(SIDE, SIDE), mean=half, std=half)})

    def defaults(self) -> dict[str, float]:
        return {"epochs": 2.0, "batch_size": 8, "lr": 3e-3}

    def draw(self, keys: Keys) -> Tensor:
        return uniform(keys, "toy.visible", 3 * SIDE * SIDE) < 0.7

    def forward(self, batch: Batch, draw: Tensor) -> dict[str, Tensor]:
        pixels = batch["views"]["image"].flatten(1)
        error = F.mse_loss(self.student(pixels * draw), self.teacher(pixels) * self.scale, reduction="none").mean(1)
        if self.config.poison is not None and self.training:
            poisoned = batch["index"] == self.config.poison
            if self.config.poison_gradient:
                weight = self.student[3].weight.sum()
                error = error + torch.where(poisoned, weight - weight, 1.0).sqrt()
            else:
                error = torch.where(poisoned, torch.nan, error)
        return {"loss": error.mean(), "error/largest": error.detach().mean() * 2}

    def prepare(self, batches: Iterable[tuple[Batch, Any]], reduce_sum: Callable[[Tensor], Tensor]) -> None:
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, _ in batches:
            target = self.teacher(batch["views"]["image"].flatten(1)).double()
            sums += torch.stack([target.new_tensor(target.numel()), target.square().sum()])
        count, squares = reduce_sum(sums)
        self.scale.fill_(float((squares / count).rsqrt()))

    def enable_grad_checkpointing(self) -> None:
        pass


def make_images(folder: Path, count: int = 48) -> Path:
    """JPEG files of smooth random colours, `count` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 20), Image.Resampling.BILINEAR).save(folder / f"{i:03d}.jpg", quality=95)
    return folder


def toy_config(data: Path | str, out: Path | str, toy: ToyConfig | None = None, **fields: Any) -> TrainConfig:
    """A run of the toy method: on the CPU, decoding in its own process, every step logged."""
    settings: dict[str, Any] = {"model": "small", "data": str(data), "out": str(out), "val": "none"}
    settings |= {"device": "cpu", "workers": 0, "log_every": 1}
    return registry.make_config("toy", **{**settings, **fields}, toy=toy or ToyConfig())


def losses(run: Path | str) -> dict[int, float]:
    """The loss curve in a run's metrics.jsonl, by step."""
    from locfast.engine.run_folder import RunFolder

    return {entry["step"]: entry["loss"] for entry in RunFolder(Path(run)).read_metrics() if "loss" in entry}
