"""UTA's own fields. Defaults are the paper's; what it leaves open is EVA-02's recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from locfast.config.base import MethodConfig, OptimConfig, check, check_choices

Objective = Literal["uta", "distillation", "mim", "uta_mim"]
ExactMasking = Literal["reversed_block", "block", "random"]


@dataclass(frozen=True, kw_only=True)
class UTAOptim(OptimConfig):
    """UTA's optimiser. Weight decay, warm-up and the last rate are section 3's; betas, eps and clip EVA-02's."""

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    decay_all: bool = False
    """Decay every tensor; False spares biases, norms and other one-dimensional tensors."""
    clip: float | None = 3.0
    """Maximum global gradient norm; None for no clipping."""
    warmup_epochs: float = 1.0
    """Linear warm-up from zero, in epochs."""
    final_lr_ratio: float = 1e-5 / 1.5e-3
    """The cosine ends at this fraction of the peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class UTAConfig(MethodConfig):
    """UTA: unmasked token alignment (section 2.2)."""

    optim: UTAOptim = field(default_factory=UTAOptim)
    """Optimiser and schedule."""
    teacher: str | None = None
    """Frozen CLIP image tower, which must be given: a name, folder or file as --model takes, or open_clip:NAME@TAG
    (open_clip:NAME@FILE; NAME may be a config file)."""
    projection: Literal["auto", "head", "none"] = "auto"
    """The teacher's way into the joint space, for every token. head: its own last linear layer, which in timm's CLIP
    models is the projection; none: its tokens behind the final norm; auto: head where timm calls the model a CLIP."""
    init: Literal["scratch", "pretrained"] = "scratch"
    """The student's first weights: drawn from the seed, or those of --model."""
    objective: Objective = "uta"
    """Table 6. uta: kept tokens alone, aligned; distillation: all tokens, none masked; mim: [MASK] tokens in place of
    hidden patches, which alone are aligned; uta_mim: the same input, every token aligned."""
    mask_ratio: float | None = None
    """Share of the patches that is hidden, the same count in every image. Default: 0.4, from a width of 1024 on 0.5."""
    masking: ExactMasking = "reversed_block"
    """reversed_block: BEiT's rectangles hidden or, with probability 0.5, all but them; block; random."""
    drop_path: float | None = None
    """Stochastic depth of the last block, rising from 0. Default: 0, from a width of 1024 on 0.1."""
    crop: Literal["random_resized", "zoom_center"] = "random_resized"
    """random_resized: a random part of the image; zoom_center: as in MaskEmbed."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop, as a share of the image."""
    flip: bool = True
    """Mirror half of the images."""

    def __post_init__(self) -> None:
        check_choices(self)
        check(
            self.mask_ratio is None or 0 < self.mask_ratio < 1,
            f"mask_ratio is the share of hidden patches, between 0 and 1; got {self.mask_ratio}. To align all tokens, "
            "type --uta.objective distillation.",
        )
        check(self.drop_path is None or 0 <= self.drop_path < 1, f"drop_path must lie in [0, 1), got {self.drop_path}")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, f"crop_scale must be two shares of the image's area, got {self.crop_scale}")
