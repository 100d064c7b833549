"""LUT's own fields. Defaults are the paper's; `form reference` is what its public code does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from locfast.config.base import MethodConfig, OptimConfig, check, check_choices

THREE_AUGMENT = "jitter-0.4-0.4-0.2-0.1+three"
"""Colour jitter with probability 0.8, then one of greyscale, solarisation and blur."""


@dataclass(frozen=True, kw_only=True)
class LUTOptim(OptimConfig):
    """MAE's optimiser and schedule, with the warm-up of LUT, section 5.1."""

    weight_decay: float = 0.05
    decay_all: bool = False
    """Decay every tensor; False spares biases, norms and other one-dimensional tensors."""
    clip: float | None = None
    """Maximum global gradient norm; None for no clipping."""
    warmup_epochs: float = 40.0
    """Linear warm-up from zero, in epochs."""
    final_lr_ratio: float = 0.0
    """The cosine ends at this fraction of the peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class LUTConfig(MethodConfig):
    """LUT: masked autoencoding whose visible tokens are steered by the context of a whole second view (section 3)."""

    optim: LUTOptim = field(default_factory=LUTOptim)
    """Optimiser and schedule."""
    form: Literal["paper", "reference"] = "paper"
    """paper: the second view goes through the momentum encoder alone; reference, as the public code: both views, with
    disjoint masks, through the encoder, and both whole ones through the momentum encoder."""
    init: Literal["scratch", "pretrained"] = "scratch"
    """scratch: --model names an architecture, its weights are drawn from the seed as MAE's; pretrained: go on from its
    weights."""
    encoding: Literal["drop", "mask_tokens"] = "drop"
    """drop: the encoder sees visible patches alone (MAE); mask_tokens: hidden ones are [MASK] tokens in the encoder,
    and one linear layer makes pixels of them (SimMIM; appendix B.1)."""
    mask_ratio: float | None = None
    """Share of hidden patches. Default: 0.75, and SimMIM's 0.6 for mask_tokens."""
    mask_unit: int | None = None
    """Side of the squares that are hidden together, in patches. Default: 1, and SimMIM's 2 for mask_tokens."""
    norm_pix: bool | None = None
    """Rebuild each patch's pixels less their mean, over their deviation. Default: yes, but not for mask_tokens."""
    context_weight: float | None = None
    """Weight of the context loss; 0: none, and no second view, i.e. MAE. Default: 0.25, and 1.0 up to ViT-S (384)."""
    predictor: bool = True
    """A second MLP behind the encoder's head, without which encoder and momentum encoder have equal heads."""
    momentum: float = 0.996
    """The momentum encoder keeps this share of itself at every step."""
    momentum_final: float | None = None
    """Where a cosine takes the momentum by the last step. Default: it stays (paper), 1.0 (reference)."""
    context_tokens: Literal["pooled", "cls"] = "pooled"
    """What stands for a view: the mean of its patch tokens, or its CLS token (table 4b)."""
    supervision: Literal["context", "token", "both"] = "context"
    """context: one vector a view; token: every token by the one at its place in the other view; both: the mean of both
    losses (table 4c)."""
    distance: Literal["cosine", "smooth_l1", "info_nce"] = "cosine"
    """Between prediction and context (table 4d)."""
    temperature: float = 0.2
    """Of info_nce."""
    steer: Literal["unmasked", "all"] = "unmasked"
    """unmasked: the context loss sees visible tokens; all: the decoder's tokens of hidden patches too (table 4a)."""
    target_mask_ratio: float = 0.0
    """Share of patches that the momentum encoder does not see (table 4e)."""
    head_width: int = 4096
    """Hidden width of the MLP heads."""
    decoder_depth: int = 8
    """Blocks in the decoder."""
    decoder_width: int = 512
    """Width of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    positions: Literal["sincos", "model"] | None = None
    """sincos: fixed, of rows and columns; model: the model's own. Default: sincos from scratch, else the model's."""
    crop: Literal["simple_resized", "random_resized"] = "simple_resized"
    """simple_resized: short side to the view's size, 4 px of reflection around, random crop; random_resized (table
    4f): area within crop_scale."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random_resized crop, as a share of the image."""
    flip: bool = True
    """Mirror half of the views, each by itself."""
    color: str | None = THREE_AUGMENT
    """Colours of the context view; None leaves them."""

    def __post_init__(self) -> None:
        check_choices(self)
        check(0 < self.hidden_share < 1, f"mask_ratio must lie in (0, 1), got {self.mask_ratio}")
        check(self.unit >= 1, f"mask_unit must be at least 1, got {self.mask_unit}")
        check(
            self.form == "paper" or self.hidden_share >= 0.5,
            f"form reference hides disjoint patches of its two views, so mask_ratio must be at least 0.5, got "
            f"{self.hidden_share}; use --lut.form paper",
        )
        check(
            self.context_weight is None or self.context_weight >= 0,
            f"context_weight must not be negative, got {self.context_weight}",
        )
        for name in ("momentum", "momentum_final"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, f"{name} must lie in [0, 1], got {value}")
        check(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        check(0 <= self.target_mask_ratio < 1, f"target_mask_ratio must lie in [0, 1), got {self.target_mask_ratio}")
        for name in ("head_width", "decoder_depth", "decoder_width", "decoder_heads"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        check(
            self.decoder_width % self.decoder_heads == 0 and self.decoder_width % 4 == 0,
            f"decoder_width must be a multiple of decoder_heads, and of 4 for its positions; got {self.decoder_width} "
            f"and {self.decoder_heads}",
        )
        check(
            0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
            f"crop_scale must be two shares, the smaller one first; got {self.crop_scale}",
        )
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Choices that exclude each other."""
        check(
            self.init == "scratch" or self.positions != "sincos",
            "positions sincos would replace those of pretrained weights; use --lut.positions model",
        )
        check(
            self.distance != "info_nce" or self.supervision == "context",
            f"info_nce tells images apart, which supervision {self.supervision} does not give one vector each; use "
            "--lut.supervision context",
        )
        check(
            self.target_mask_ratio == 0 or self.supervision == "context",
            f"supervision {self.supervision} needs every token of the other view, but target_mask_ratio "
            f"{self.target_mask_ratio} hides some; use --lut.supervision context",
        )
        check(
            self.steer == "unmasked" or self.context_tokens == "pooled",
            "steer all pools hidden tokens with visible ones, but the CLS token is not pooled; use "
            "--lut.context-tokens pooled",
        )

    @property
    def hidden_share(self) -> float:
        """mask_ratio, or the encoding's own."""
        return self._or("mask_ratio", 0.75, 0.6)

    @property
    def unit(self) -> int:
        """mask_unit, or the encoding's own."""
        return self._or("mask_unit", 1, 2)

    @property
    def normalises_pixels(self) -> bool:
        """norm_pix, or the encoding's own."""
        return self._or("norm_pix", True, False)

    @property
    def last_momentum(self) -> float:
        """Where the momentum ends."""
        if self.momentum_final is not None:
            return self.momentum_final
        return self.momentum if self.form == "paper" else 1.0

    @property
    def has_sincos_positions(self) -> bool:
        """Whether the encoder's positions are fixed ones of sines and cosines."""
        return self.positions == "sincos" or (self.positions is None and self.init == "scratch")

    def _or(self, name: str, drop: Any, mask_tokens: Any) -> Any:
        given = getattr(self, name)
        return given if given is not None else drop if self.encoding == "drop" else mask_tokens
