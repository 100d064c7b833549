"""What a method is to the engine: networks, arithmetic and randomness behind one face."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locfast.config.base import OptimConfig
from locfast.data.spec import ImageSpec
from locfast.methods.ranks import alone
from locfast.models.blocks import is_known_block
from locfast.models.compiled import compile_blocks
from locfast.random import Keys

Batch = dict[str, Any]
"""{"views": {name: [B, 3, h, w] fp32, normalised}, "geometry": {name: Geometry}, "index": [B], "epoch": [B], ...}"""

VALIDATION_EPOCH = 0xFFFFFFFF
PREPARATION_EPOCH = 0xFFFFFFFE
"""Epochs that no training reaches: held-out and calibration passes draw there, so their numbers are their own."""


@dataclass(frozen=True)
class Seen:
    """What of one view of a batch the networks see."""

    images: Tensor  # [B, 3, h, w], normalised as the view is
    visible: Tensor | None = None  # [B, V, rows, columns] bool over the patches, True = kept; None: no masks
    masks: tuple[str, ...] = ()
    """What to call each of the V masks."""


class Method(nn.Module):
    """A training method: owns every network it needs and all of its arithmetic; knows nothing of ranks or steps.

    Frozen networks have `requires_grad=False`; they are saved once a run, everything else in every checkpoint.
    """

    moving: tuple[str, ...] = ()
    """Children without gradients that change all the same (a momentum encoder): they are in every checkpoint."""

    optim: OptimConfig
    """Optimiser and schedule, from the method's config."""
    preparation_samples: int = 0
    """How many samples `prepare` wants to see before step 0; 0 for none."""

    def image_spec(self) -> ImageSpec:
        """The views this method trains on."""
        raise NotImplementedError

    def validation_spec(self) -> ImageSpec:
        """The views of the held-out loss: no random crop. Default: those of training."""
        return self.image_spec()

    def defaults(self) -> dict[str, float]:
        """Values for flags that the user left open: epochs, batch_size, lr."""
        raise NotImplementedError

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise UserError or BackendError for what cannot run on `device` in `dtype`, before anything is written."""

    def notes(self, micro_batch: int, ranks: int, accumulation: int) -> list[str]:
        """What a user should know of a run whose steps are `accumulation` rounds of `ranks` x `micro_batch` images.

        Raises UserError where the method cannot train on so few at a time.
        """
        return []

    draws_on_host: bool = False
    """Whether the host must know what is drawn (which caption is read): it draws by itself then, and no GPU is waited
    for."""

    def keys(self, seed: int, batch: Batch) -> Keys:
        """Who draws for a batch: on the device, or where the method draws on the host, there."""
        who = batch["host"] if self.draws_on_host and "host" in batch else batch
        return Keys(seed, who["epoch"], who["index"])

    def draw(self, keys: Keys) -> Any:
        """The method's random numbers for the samples of `keys`, on the device of `keys`."""
        raise NotImplementedError

    def forward(self, batch: Batch, draw: Any) -> dict[str, Tensor]:
        """{"loss": scalar with gradient, other names: detached scalars to log}; the mean over the batch's samples."""
        raise NotImplementedError

    def alone(self, batch: Batch, draw: Any) -> Tensor:
        """The loss of a batch of one image, to find the one that is at fault. No other rank can be asked meanwhile."""
        with alone():
            return self(batch, draw)["loss"]

    looks_ahead: bool = False
    """Whether a step of several micro-batches must be seen whole before the first of them gives a gradient."""

    def look(self, batch: Batch, draw: Any) -> Any:
        """For a method that looks ahead: what it wants to know of a micro-batch, without gradients.

        torch's generator is where it will be in `forward`.
        """
        raise NotImplementedError

    def weigh(self, looks: list[Any]) -> list[Any]:
        """What `look` gave for all micro-batches of a step -> what `forward` finds of each in batch["ahead"].

        Under the autocast of the step; gradients may be taken.
        """
        raise NotImplementedError

    def seen(self, batch: Batch, draw: Any) -> dict[str, Seen]:
        """What the networks see of a batch, by view, for a picture of it. Default: every view, and all of it."""
        return {name: Seen(images) for name, images in batch["views"].items()}

    def prepare(self, batches: Iterable[tuple[Batch, Any]], reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Look at `preparation_samples` samples before step 0 (never on resume) and fill buffers.

        `batches` yields (batch, draw); `reduce_sum` adds a tensor over all ranks.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of the trainable parameters, each with its `weight_decay`."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        decay = self.optim.weight_decay
        if self.optim.decay_all:
            return [{"params": [p for _, p in named], "weight_decay": decay}]
        spared = self.undecayed()
        decayed = [p for n, p in named if p.ndim > 1 and n not in spared]
        others = [p for n, p in named if p.ndim <= 1 or n in spared]
        return [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]

    def undecayed(self) -> set[str]:
        """Names of parameters that have no weight decay beside one-dimensional ones (with `decay_all` off)."""
        return set()

    def after_step(self, step: int, steps: int) -> None:
        """Called after optimiser step number `step` (from 1) of `steps`: moving averages and the like."""

    def enable_compile(self) -> None:
        """Compile the networks in place (`--compile`), block by block where they have blocks; same state-dict keys."""
        if not compile_blocks(self, is_known_block):
            self.compile(dynamic=False)

    def enable_grad_checkpointing(self) -> None:
        """Recompute activations of the trainable networks in the backward pass (`--grad-checkpointing`)."""
        raise NotImplementedError

    def frozen_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of frozen networks by state-dict key: saved once a run."""
        still = [m for name, m in self.named_children() if name not in self.moving]
        frozen = [m for m in still if not any(p.requires_grad for p in m.parameters())]
        inside = {id(t) for m in frozen for t in (*m.parameters(), *m.buffers())}
        return {k: t for k, t in self.state_dict(keep_vars=True).items() if id(t) in inside}

    def training_state(self) -> dict[str, Tensor]:
        """Everything else of the state dict: saved in every checkpoint."""
        frozen = self.frozen_state()
        return {k: t.detach() for k, t in self.state_dict(keep_vars=True).items() if k not in frozen}

    def artifacts(self) -> dict[str, Any]:
        """What an export holds: {"backbone": Backbone to export, "softcap": float | None, ...}."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
