"""CLOC's own fields. Defaults are the paper's (section 3 and appendix A.1); docs/cloc.md says which it leaves open."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from locfast.config.base import check
from locfast.config.clip import MAX_SCALE, ClipConfig, ClipOptim


@dataclass(frozen=True, kw_only=True)
class ClocOptim(ClipOptim):
    """AdamW with weight decay 0.2 on matrices, 2000 steps of warm-up, and a cosine to zero (table A)."""

    name: str = "adamw"
    """Any optimiser name of timm's factory (adamw, lamb, fusedadamw, ...)."""
    weight_decay: float = 0.2
    warmup_epochs: float = 0.0
    """Linear warm-up from zero, in epochs."""
    warmup_steps: int | None = 2000
    """Linear warm-up in steps, in the place of epochs."""


@dataclass(frozen=True, kw_only=True)
class ClocConfig(ClipConfig):
    """CLOC: contrastive localized language-image pre-training (section 3)."""

    optim: ClocOptim = field(default_factory=ClocOptim)
    """Optimiser and schedule."""
    init: Literal["scratch", "pretrained"] = "scratch"
    """First weights of both towers: drawn from the seed, or those of --model and --cloc.text-pretrained."""
    text: str = "ViT-B-16"
    """open_clip model, by name or config file (.json), whose text tower and tokenizer are used; with --model open_clip
    its image tower too."""
    text_pretrained: str = "openai"
    """Its weights where --cloc.init is pretrained: a tag of open_clip's, a checkpoint file, or none."""
    freeze_text: bool = False
    """Leave the text tower as it is; tower, prompter and box head are trained."""
    temperature: float = 0.07
    """Cosines are divided by it; where it is learned, at the start."""
    learn_temperature: bool = True
    """Train the logarithm of its inverse, which stays at or below log 100 and has no weight decay, as in CLIP."""
    region_temperature: float = 0.07
    """The same for regions and phrases, which have a scale of their own."""
    layer_decay: float | None = 1.0
    """A block's learning rate is that of the next one times this, in both towers; 1 for none."""
    crop: Literal["pad", "random_resized", "center"] = "pad"  # type: ignore[assignment]
    """pad: the long side resized, the rest filled with the mean colour; random_resized: a random part of the image;
    center: the model's evaluation transform."""
    regions: int = 4
    """M: regions drawn of every image, or as many as it has (2 work nearly as well: table 2)."""
    region_weight: float | None = None
    """lambda of equation 4. Default: the share of the batch's images that have regions."""
    filter_threshold: float | None = 0.9
    """A phrase is no negative of another that its cosine with lies above this (section 3.4); none: all are."""
    grounding: bool = True
    """Predict a box from its phrase, too (equation 3)."""
    grounding_eps: float = 1e-6
    """Under the root of equation 3's norm, squared."""
    prompter: Literal["self", "cross", "roi"] = "self"
    """self: attention over prompt and image tokens; cross: prompt tokens alone attend, at a fraction of the cost; roi:
    RoI-align, the baseline of table 2, which takes no phrase."""
    prompter_ratio: float = 4.0
    """Width of the prompter's MLP over that of the tower."""
    box_frequencies: tuple[float, float] = (0.5, 64.0)
    """Cycles across the frame of the slowest and the fastest wave of a corner's code."""
    add_places: bool = False
    """Add the code of its patch's centre to every image token that a prompter reads. The paper has no such thing: its
    towers learn to keep places in their tokens, which takes longer than a short run has."""
    roi_size: int = 7
    """Samples of RoI-align along a side of a box."""
    min_shown: float = 0.5
    """A box of which a view shows a smaller share is left out."""
    min_side: float = 1.0
    """So is one whose shorter side has fewer pixels of the view."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            1 / MAX_SCALE <= self.region_temperature < math.inf,
            f"region_temperature must be at least {1 / MAX_SCALE} and finite, got {self.region_temperature}",
        )
        check(self.regions >= 1, f"regions must be at least 1, got {self.regions}")
        weight, threshold = self.region_weight, self.filter_threshold
        check(weight is None or 0 <= weight < math.inf, f"region_weight must not be negative, got {weight}")
        check(threshold is None or -1 <= threshold <= 1, f"filter_threshold is a cosine, got {threshold}")
        check(self.grounding_eps > 0, f"grounding_eps must be positive, got {self.grounding_eps}")
        check(
            self.prompter != "roi" or not self.grounding,
            "--cloc.prompter roi pools boxes and takes no phrase, so that nothing can be grounded. Type "
            "--cloc.no-grounding too, as the paper's table 2 has it.",
        )
        check(self.prompter_ratio > 0, f"prompter_ratio must be positive, got {self.prompter_ratio}")
        low, high = self.box_frequencies
        check(0 < low < high < math.inf, f"box_frequencies must rise from above 0, got {self.box_frequencies}")
        check(self.roi_size >= 1, f"roi_size must be at least 1, got {self.roi_size}")
        check(0 < self.min_shown <= 1, f"min_shown is a share in (0, 1], got {self.min_shown}")
        check(self.min_side > 0, f"min_side must be positive, got {self.min_side}")
