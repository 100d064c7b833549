"""What every training run is told, whatever its method. Standard library only: `--help` must not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from locfast.errors import UserError


def check(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds: how configs refuse impossible values."""
    if not condition:
        raise UserError(message)


def check_choices(config: Any) -> None:
    """Raise UserError for a field of a Literal type whose value is none of its choices: whoever built the config."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            value, choices = getattr(config, name), get_args(hint)
            check(value in choices, f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule. The learning rate itself is the run's `--lr`."""

    name: str = "adamw"
    """Any optimiser name of timm's factory (adamw, lamb, fusedadamw, ...)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay_all: bool = True
    """Decay every tensor; False spares biases, norms and other one-dimensional tensors."""
    clip: float | None = 1.0
    """Maximum global gradient norm; None for no clipping."""
    warmup_epochs: float = 0.0
    """Linear warm-up from zero, in epochs."""
    warmup_steps: int | None = None
    """Linear warm-up in steps, in the place of epochs."""
    final_lr_ratio: float = 0.1
    """The cosine ends at this fraction of the peak learning rate."""

    def __post_init__(self) -> None:
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas must lie in [0, 1), got {self.betas}")
        check(self.weight_decay >= 0, f"optim.weight_decay must not be negative, got {self.weight_decay}")
        check(self.clip is None or self.clip > 0, f"optim.clip must be positive or None, got {self.clip}")
        check(self.warmup_epochs >= 0, f"optim.warmup_epochs must not be negative, got {self.warmup_epochs}")
        steps = self.warmup_steps
        check(steps is None or steps >= 0, f"optim.warmup_steps must not be negative, got {steps}")
        check(0 <= self.final_lr_ratio <= 1, f"optim.final_lr_ratio must lie in [0, 1], got {self.final_lr_ratio}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Flags of `python -m locfast.train`. None means: the method's default, resolved and written to config.yaml."""

    method: str = "maskembed"
    """Training method (`--method help` lists them)."""
    model: str = "demo"
    """timm model name, hf-hub:org/name, a local folder or checkpoint file (as name@file), or demo."""
    pretrained: bool = True
    """Start from pretrained weights."""
    image_size: int | None = None
    """Side of the input in pixels; position embeddings are resampled. Default: the model's own."""
    data: str = "demo"
    """Image folder, file list (.txt), images with texts (.jsonl), tar shards (folder, pattern or URL), or demo."""
    val: str | None = None
    """Held-out images for the validation loss: a source like --data, or none. Default: a small part of --data."""
    out: str | None = None
    """Run folder. Default: runs/METHOD-MODEL."""
    recipe: str | None = None
    """A published recipe, e.g. clip_l14_336 (`--recipe help` lists them)."""
    config: str | None = None
    """A YAML file as written to a run folder; flags override it."""
    epochs: float | None = None
    """Passes over the data."""
    steps: int | None = None
    """Optimiser steps; overrides --epochs."""
    batch_size: int | None = None
    """Global batch: images per optimiser step over all ranks and micro-batches."""
    micro_batch: int | None = None
    """Images per forward pass and rank; the rest is gradient accumulation. Default: no accumulation."""
    lr: float | None = None
    """Peak learning rate."""
    workers: int | None = None
    """Decoding processes per rank. Default: by the number of cores."""
    decoder: Literal["auto", "cpu", "nvjpeg", "dali"] = "auto"
    """What decodes images: the workers (cpu), or the GPU. auto: DALI, else cpu; the log says why."""
    max_bad: float = 0.01
    """Stop when more than this share of the data set's files cannot be read; 0: at the first one, 1: never."""
    shuffle: Literal["auto", "full", "blocks"] = "auto"
    """Order of samples: full, or blocks of neighbours, which slow disks read fast. auto: blocks for tar shards."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on the CPU. Weights stay fp32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    kernels: Literal["auto", "reference", "tiled", "triton", "cuda"] = "auto"
    """Backend of the fused ops."""
    seed: int = 0
    """Of every random number: masks, crops, order, initialisation."""
    deterministic: bool = False
    """Bit-equal runs on a GPU, at some cost in speed. The CPU is bit-equal anyway."""
    compile: bool = False
    """torch.compile the networks."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    ema: float | None = None
    """Keep (and export) an exponential moving average of the weights with this decay, e.g. 0.9998."""
    resume: bool = False
    """Go on from the newest complete checkpoint in --out."""
    overwrite: bool = False
    """Replace a run folder that exists."""
    log_every: int = 10
    """Steps between lines in the log and in metrics.jsonl."""
    save_every: int | None = None
    """Steps between checkpoints. Default: ten over the run, and one at the end."""
    track: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl: tensorboard, wandb."""

    def __post_init__(self) -> None:
        for name in ("image_size", "epochs", "steps", "batch_size", "micro_batch", "lr", "save_every", "log_every"):
            value = getattr(self, name)
            check(value is None or value > 0, f"--{name.replace('_', '-')} must be positive, got {value}")
        check(self.workers is None or self.workers >= 0, f"--workers must not be negative, got {self.workers}")
        check(0 <= self.max_bad <= 1, f"--max-bad is a share, from 0 to 1; got {self.max_bad}")
        check(self.ema is None or 0 < self.ema < 1, f"--ema must lie between 0 and 1, got {self.ema}")
        check(0 <= self.seed < 2**63, f"--seed must lie in 0 .. 2^63 - 1, got {self.seed}")
        known = ("tensorboard", "wandb")
        check(all(t in known for t in self.track), f"--track knows {', '.join(known)}, got {' '.join(self.track)}")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of a method's own fields (`--maskembed.softcap 30`). Subclasses add fields with defaults."""

    execution: ClassVar[tuple[str, ...]] = ()
    """Fields that say how something is computed and not what: a resumed run may change them, as it may its kernels."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""

    @property
    def from_scratch(self) -> bool:
        """Whether what is trained begins with random weights, whatever --pretrained says of other networks."""
        return getattr(self, "init", "pretrained") == "scratch"
