"""Where a run's numbers go: metrics.jsonl always; TensorBoard and Weights & Biases by name."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from locfast.errors import UserError

Numbers = dict[str, float]
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    def write(self, step: int, numbers: Numbers) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """One JSON object a line, with the numbers in full precision."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, numbers: Numbers) -> None:
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.file.flush()

    def to_disk(self) -> None:
        """Make the lines durable, so that a checkpoint never knows more steps than they do."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run in the project `locfast`; a resumed run goes on under its own id, kept in RUN/wandb-id.txt."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        import wandb

        kept = run / "wandb-id.txt"
        identity = kept.read_text().strip() if kept.is_file() else None
        self.run = wandb.init(
            project="locfast",
            name=run.name,
            dir=str(run),
            config=config,
            id=identity,
            resume="allow" if identity else None,
        )
        kept.write_text(self.run.id + "\n")

    def write(self, step: int, numbers: Numbers) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


def open_trackers(names: tuple[str, ...], run: Path, config: dict[str, Any], step: int) -> list[Tracker]:
    """The trackers called `names`, for a run that stands at `step`; `require` has been asked before."""
    make: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run, step),
        "wandb": lambda: WandB(run, config),
    }
    return [make[name]() for name in dict.fromkeys(names)]


def require(names: tuple[str, ...]) -> None:
    """UserError where the package of a tracker is missing: asked before a run writes anything."""
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise UserError(
                f"--track {name}: the package cannot be imported ({error}). Install it with `pip install {name}`."
            ) from error
