"""How a backbone is fine-tuned: LUT's table D, which is MAE's recipe."""

from __future__ import annotations

from dataclasses import dataclass

from locfast.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Every setting of one model's fine-tuning."""

    epochs: float
    base_lr: float
    """For batches of 256; the rate itself is base_lr * batch_size / 256."""
    layer_decay: float
    warmup: float = 5.0
    """Epochs in which the rate rises from 0."""
    min_lr: float = 1e-6
    batch_size: int = 1024
    micro_batch: int | None = None
    """Images whose activations lie in memory at once; None: the whole batch."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    color: str | None = "rand-m9-mstd0.5-inc1"
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        for name in ("epochs", "base_lr", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{_flag(name)} must be positive, got {value}.")
        for name, most in (("drop_path", 1), ("smoothing", 1)):
            if not 0 <= getattr(self, name) < most:
                raise UserError(f"--{_flag(name)} {getattr(self, name)}: type at least 0 and less than {most}.")
        for name in ("warmup", "min_lr", "weight_decay", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{_flag(name)} {getattr(self, name)}: type at least 0.")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"--layer-decay {self.layer_decay}: type more than 0 and at most 1 (1: none).")
        if not self.warmup < self.epochs:
            raise UserError(
                f"--warmup {self.warmup:g}: the rate rises for so many epochs, of {self.epochs:g} in all. Type a "
                "smaller --warmup, or more --epochs."
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UserError(f"--batch-size {self.batch_size}: mixup pairs images, so type an even number.")

    @property
    def lr(self) -> float:
        return self.base_lr * self.batch_size / 256

    def steps(self, images: int) -> tuple[int, int]:
        """Steps in all, and of them those of the warm-up, over `images` training images."""
        steps = max(1, round(self.epochs * images / self.batch_size))
        return steps, min(steps - 1, round(self.warmup * images / self.batch_size))


def _flag(field: str) -> str:
    return {"base_lr": "lr"}.get(field, field.replace("_", "-"))


SIZES = {"S": (300.0, 5e-4, 0.75), "B": (100.0, 2.5e-4, 0.65), "L": (50.0, 1e-3, 0.65)}
"""Epochs, base rate and layer decay by the size of the model (table D)."""


def size_of(embed_dim: int) -> str:
    """S up to a width of 384, B up to 768, L beyond."""
    return "S" if embed_dim <= 384 else "B" if embed_dim <= 768 else "L"
