"""Fields of contrastive fine-tuning. Defaults are UTA's (section 3 and appendix A.1); docs/clip.md says which it leaves
open."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from locfast.config.base import MethodConfig, OptimConfig, check, check_choices

MAX_SCALE = 100.0
"""What cosines are multiplied with at most, as in CLIP: a temperature of 0.01."""


@dataclass(frozen=True, kw_only=True)
class ClipOptim(OptimConfig):
    """LAMB with weight decay 0.05 on matrices, and a cosine to zero (UTA, appendix A.1)."""

    name: str = "lamb"
    """Any optimiser name of timm's factory (adamw, lamb, fusedadamw, ...)."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    decay_all: bool = False
    """Decay every tensor; False spares biases, norms and other one-dimensional tensors."""
    clip: float | None = 1.0
    """Maximum global gradient norm; None for no clipping."""
    warmup_epochs: float = 0.1
    """Linear warm-up from zero, in epochs."""
    final_lr_ratio: float = 0.0
    """The cosine ends at this fraction of the peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig(MethodConfig):
    """Contrastive fine-tuning of an image tower with a text tower (UTA, section 3 and appendix A.1)."""

    text: str = "EVA01-g-14-plus"
    """open_clip model, by name or config file (.json), whose text tower and tokenizer are used; with --model open_clip
    its image tower too."""
    text_pretrained: str = "merged2b_s11b_b114k"
    """Its weights: a tag of open_clip's, a checkpoint file, or none for random ones, as --no-pretrained gives too."""
    projection: Literal["auto", "new"] = "auto"
    """From the image's width to the text's: auto: the model's own where it has one (timm's CLIP models, a timm folder
    whose config has num_classes), else a new one; new: a new one."""
    freeze_text: bool = False
    """Train the image tower alone; texts are then embedded once a step, and without gradients."""
    temperature: float = 0.01
    """Cosines are divided by it; where it is learned, at the start."""
    learn_temperature: bool = False
    """Train the logarithm of its inverse, which stays at or below log 100 and has no weight decay, as in CLIP."""
    layer_decay: float | None = None
    """A block's learning rate is that of the next one times this, in both towers. Default: 0.75 up to a width of 768,
    0.85 beyond."""
    text_lr_scale: float = 1.0
    """The text tower's learning rate as a share of --lr."""
    drop_path: float = 0.0
    """Stochastic depth of the image tower: the last block's rate."""
    crop: Literal["random_resized", "center"] = "random_resized"
    """random_resized: a random part of the image; center: the model's evaluation transform."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area of a random crop, as a share of the image."""
    flip: bool = False
    """Mirror half of the images; captions that say left or right are then wrong."""
    optim: ClipOptim = field(default_factory=ClipOptim)
    """Optimiser and schedule."""

    def __post_init__(self) -> None:
        check_choices(self)
        check(
            1 / MAX_SCALE <= self.temperature < math.inf,
            f"temperature must be at least {1 / MAX_SCALE} and finite, got {self.temperature}",
        )
        check(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"layer_decay must lie in (0, 1], 1 for none; got {self.layer_decay}",
        )
        check(self.text_lr_scale > 0, f"text_lr_scale must be positive, got {self.text_lr_scale}")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, f"crop_scale must be two shares of the image's area, got {self.crop_scale}")
        check(0 <= self.drop_path < 1, f"drop_path must lie in [0, 1), got {self.drop_path}")
