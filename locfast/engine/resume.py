"""Going on with a run: which checkpoint to take, whether it is of this run, and putting it back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from locfast.config.base import MethodConfig, TrainConfig
from locfast.config.files import to_dict
from locfast.config.registry import method_config
from locfast.data.loader import Loader
from locfast.data.order import pick_shuffle
from locfast.data.spec import Source
from locfast.engine import checkpoint
from locfast.engine.checkpoint import Checkpoint
from locfast.engine.distributed import World
from locfast.engine.ema import Average
from locfast.engine.logs import log
from locfast.engine.optim import load_state_tensors
from locfast.engine.run_folder import RunFolder
from locfast.engine.schedule import Plan
from locfast.errors import UserError
from locfast.methods.base import Method

SHUFFLE_BEFORE = "full"
"""What checkpoints did from before the field existed."""


@dataclass(frozen=True)
class Point:
    """Where a run starts: at a checkpoint, or at step 0 with none."""

    checkpoint: Checkpoint | None
    frozen_damage: str | None
    """What is wrong with the frozen weights that the checkpoint belongs to, or None."""
    messages: list[str]

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def needs_pretrained(self) -> bool:
        """Whether weights have to come from the pretrained model: all at the start, frozen ones when damaged."""
        return self.checkpoint is None or self.frozen_damage is not None


def find(config: TrainConfig, folder: RunFolder, world: World) -> Point:
    """The newest complete checkpoint of the run with --resume, or the start."""
    if not config.resume:
        return Point(None, None, [])
    messages: list[str] = []

    def search() -> tuple[str | None, list[str], str | None]:
        found, complaints = checkpoint.newest(folder.checkpoints)
        damage = checkpoint.damage(folder.frozen, found.state["frozen"]) if found else None
        return str(found.folder) if found else None, complaints, damage

    path, complaints, frozen_damage = world.on_first(search)
    for complaint in complaints:
        messages.append(f"Damaged checkpoint: {complaint}; taking the one before.")
    if path is None:
        messages.append(f"{folder.path} holds no complete checkpoint: starting at step 0.")
        return Point(None, None, messages)
    found = checkpoint.read(Path(path))
    messages.append(f"Resuming from {path}, after step {found.step}.")
    if frozen_damage:
        messages.append(f"Damaged frozen weights: {frozen_damage}; taking them from the pretrained model again.")
    return Point(found, frozen_damage, messages)


def shuffle(config: TrainConfig, point: Point, source: Source) -> Literal["full", "blocks"]:
    """What --shuffle auto means for this run: what its checkpoint did, at the start what suits the source."""
    if config.shuffle == "auto" and point.checkpoint is not None:
        return point.checkpoint.state["settings"].get("shuffle", SHUFFLE_BEFORE)
    return pick_shuffle(config.shuffle, source)


def identity(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """What makes two runs the same curve: settings that a resumed run must share with the one it goes on with."""
    names = ("method", "model", "pretrained", "image_size", "seed", "batch_size", "lr", "ema", "shuffle")
    settings = {name: getattr(config, name) for name in names}
    own = _own(config, method_config(config))
    return {"settings": {**settings, "steps": plan.steps, "images": plan.samples, **own}}


def _own(config: TrainConfig, fields: MethodConfig) -> dict[str, Any]:
    """The fields of a method that decide what is computed: {"METHOD.FIELD": value, ...}."""
    values = _flat(to_dict(fields)).items()
    return {f"{config.method}.{name}": value for name, value in values if name not in fields.execution}


def check_identity(point: Point, ours: dict[str, Any], config: TrainConfig, folder: RunFolder) -> None:
    """UserError when the checkpoint is of another run."""
    if point.checkpoint is None:
        return
    fields = method_config(config)
    # a checkpoint from before a field existed did what the field's default does; one that lost its say is passed over
    then = {"shuffle": SHUFFLE_BEFORE, **_own(config, type(fields)()), **point.checkpoint.state["settings"]}
    now = ours["settings"]
    passed = {f"{config.method}.{name}" for name in fields.execution}
    differing = [name for name in {**then, **now} if name not in passed and then.get(name) != now.get(name)]
    if differing:
        told = "; ".join(f"{name} was {then.get(name)}, now {now.get(name)}" for name in differing[:6])
        raise UserError(
            f"--resume: the checkpoint {point.checkpoint.folder} is of another run: {told}. "
            f"`--resume --out {folder.path}` alone takes every setting from the run; new settings want another --out."
        )


def restore(
    point: Point,
    folder: RunFolder,
    world: World,
    method: Method,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    loader: Loader,
) -> dict[str, int]:
    """Put the checkpoint back and make the folder look as it did then; gives the frozen weights' fingerprint."""
    for message in point.messages:
        log.info("%s", message)
    if found := point.checkpoint:
        frozen = method.frozen_state() if point.frozen_damage else checkpoint.read_tensors(folder.frozen)
        checkpoint.restore(method, {**frozen, **found.tensors("model")}, found.folder)
        load_state_tensors(optimizer, method, found.tensors("optimizer"), found.state["optimizer"])
        if average is not None:
            average.load(found.tensors("ema"))
        data = {"samples": found.state["position"], **found.state["data"]}  # a count that older checkpoints lack
        loader.load_state(data if world.first else {**data, "count": 0, "samples": 0})

    def tidy() -> dict[str, int]:
        checkpoint.put_aside_newer(folder.checkpoints, point.step)
        folder.cut_metrics(point.step)
        if found and not point.frozen_damage:
            return dict(found.state["frozen"])
        return checkpoint.write_frozen(folder.checkpoints, method.frozen_state())

    return world.on_first(tidy)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"eps": 1}} -> {"optim.eps": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
