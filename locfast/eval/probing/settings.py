"""How the heads of a probe are trained and judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from locfast.errors import UserError
from locfast.eval.heads import HeadKind, Intervention, Task

Labels = Literal["union", "majority"]
Protocol = Literal["held-out", "paper"]
Control = Literal["none", "position", "shuffled"]


@dataclass(frozen=True)
class Settings:
    """Defaults are the paper's (table 3, and the public reference where it says nothing). Raises UserError."""

    heads: tuple[HeadKind, ...] = ("transformer", "mlp", "linear")
    tasks: tuple[Task, ...] = ("local", "global")
    interventions: tuple[Intervention, ...] = ("none",)
    """prefix and anonymous add a local transformer head each."""
    labels: Labels = "union"
    """union: every class in a patch, BCE; majority: the most frequent one, cross-entropy."""
    protocol: Protocol = "held-out"
    """held-out: a part of the training images, which no head trains on, chooses the epoch; paper: the validation images
    do, on which scores are reported too, as the public reference does."""
    held_out: float = 0.1
    """Share of the training images that chooses."""
    seeds: tuple[int, ...] = (0,)
    """Of heads and of the order of images; the images held out are the same for all."""
    epochs: int = 5
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 500
    """From 0 to lr; at most a tenth of all steps. Then a cosine down to a tenth of lr."""
    control: Control = "none"
    """What a probe should not find much in: position: tokens that are the same for all images; shuffled: the labels of
    another training image."""

    def __post_init__(self) -> None:
        for name, allowed in (("heads", HeadKind), ("tasks", Task), ("interventions", Intervention)):
            chosen = getattr(self, name)
            wrong = [one for one in chosen if one not in get_args(allowed)]
            if wrong or not chosen or len(set(chosen)) < len(chosen):
                raise UserError(
                    f"--{name} {' '.join(chosen)}: one or more of {', '.join(get_args(allowed))}, each once."
                )
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("warmup_steps", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: {lowest} or more.")
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise UserError(
                f"--lr {self.lr} --weight-decay {self.weight_decay}: a positive rate, a decay of 0 or more."
            )
        if not 0 < self.held_out < 1:
            raise UserError(f"--held-out {self.held_out}: a share of the training images, between 0 and 1.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= one < 2**63 for one in self.seeds):
            raise UserError(
                f"--seeds {' '.join(map(str, self.seeds))}: one or more whole numbers from 0 to 2^63 - 1, each once."
            )
        hindered = [one for one in self.interventions if one != "none"]
        if hindered and not ("transformer" in self.heads and "local" in self.tasks):
            raise UserError(
                f"--interventions {' '.join(hindered)}: for the local transformer head, which --heads and --tasks "
                "leave out."
            )

    def forms(self) -> list[tuple[Task, HeadKind, Intervention]]:
        """All heads of one seed."""
        plain: list[tuple[Task, HeadKind, Intervention]] = [
            (task, head, "none") for task in self.tasks for head in self.heads if "none" in self.interventions
        ]
        return plain + [("local", "transformer", one) for one in self.interventions if one != "none"]
