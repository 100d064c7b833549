"""MaskEmbed's own fields. Defaults are the public reference's; alternatives are the paper's ablations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from locfast.config.base import MethodConfig, check, check_choices

Target = Literal["penultimate", "last", "last_cls"]
Masking = Literal["uniform", "bernoulli", "block", "reversed_block"]
DecoderKind = Literal["transformer", "average", "additive"]
Loss = Literal["mse", "cosine", "l1"]
LossOn = Literal["all", "hidden", "visible"]
UncappedAttention = Literal["sdpa", "flash-attn"]
TeacherPrecision = Literal["same", "fp8"]


@dataclass(frozen=True, kw_only=True)
class MaskEmbedConfig(MethodConfig):
    """MaskEmbed: masked embedding self-consistency (Locality Alignment, section 3)."""

    execution = ("uncapped_attention", "teacher_chunk", "teacher_graph")

    target: Target = "penultimate"
    """penultimate: blocks 1..L-1, then the pretrained final norm, all tokens; last: all blocks; last_cls: its CLS."""
    target_scale: bool = True
    """Divide targets by one scalar: their standard deviation over samples, tokens, views and dims (mse and l1)."""
    teacher_precision: TeacherPrecision = "same"
    """same: as --precision says; fp8: the linear layers of the teacher's blocks in e4m3, on a GPU from sm_89 on;
    a CPU computes the same quantised products in fp32."""
    masking: Masking = "uniform"
    """uniform: number of visible patches uniform on 0..N, ends included; bernoulli: each patch visible with
    probability bernoulli_p; block: random rectangles (BEiT's) visible; reversed_block: the rectangles hidden."""
    bernoulli_p: float = 0.5
    """Probability that a patch is visible, for bernoulli masks."""
    block_fraction: float = 0.4
    """Rectangles are added until they cover this share of the image, for block and reversed_block masks."""
    complement: bool = True
    """Also use the complement of every mask."""
    all_visible: bool = True
    """Also use the unmasked image."""
    head: Literal["linear", "mlp"] = "linear"
    """From the encoder's width to the teacher's; the last layer starts at zero."""
    reinit_norm: bool = True
    """Start the encoder's final norm anew."""
    reinit_last_block: bool = False
    """Start the encoder's last block anew (ablation)."""
    softcap: float | None = 30.0
    """softcap * tanh(logits / softcap) in the student encoder's attention; None for plain attention."""
    uncapped_attention: UncappedAttention = "sdpa"
    """Attention without a cap: of teacher and decoder, and of a student with softcap None. sdpa: PyTorch's own;
    flash-attn: the newest of its versions 4, 3, 2 that is installed, on a GPU in bf16."""
    teacher_chunk: int | None = None
    """Images at a time through the frozen teacher, to save memory; None: a whole micro-batch, and half of that
    whenever it does not fit."""
    teacher_graph: bool = False
    """Replay the teacher as one CUDA graph: for small micro-batches, whose kernels end before the next is launched."""
    decoder: DecoderKind = "transformer"
    """average and additive are the weak decoders of equation 2 and table 1: target last_cls, masks block."""
    decoder_depth: int = 2
    """Blocks in the decoder."""
    decoder_layer_scale: float = 1e-6
    """Initial LayerScale of the decoder's blocks."""
    loss: Loss = "mse"
    """Between reconstruction and target, fp32."""
    loss_on: LossOn = "all"
    """all tokens, prefixes included; or only hidden, or only visible patches."""
    crop: Literal["zoom_center", "random_resized"] = "zoom_center"
    """zoom_center: random zoom and aspect, then centre crop or reflect pad; random_resized: scale 0.08-1."""
    flip: bool = True
    """Mirror half of the images."""
    randaugment: str | None = None
    """A timm RandAugment string, e.g. rand-m9-mstd0.5-inc1 (ablation)."""
    mixup: float = 0.0
    """Beta(alpha, alpha) of mixup between images of a micro-batch; 0 for none (ablation, 0.5)."""
    cutmix: float = 0.0
    """Beta(alpha, alpha) of cutmix; 0 for none (ablation, 1.0)."""

    def __post_init__(self) -> None:
        check_choices(self)
        check(
            self.softcap is None or 0 < self.softcap < math.inf,
            f"softcap must be positive and finite, or None for plain attention; got {self.softcap}",
        )
        check(0 < self.bernoulli_p < 1, f"bernoulli_p must lie in (0, 1), got {self.bernoulli_p}")
        check(0 < self.block_fraction < 1, f"block_fraction must lie in (0, 1), got {self.block_fraction}")
        check(
            self.teacher_chunk is None or self.teacher_chunk >= 1,
            f"teacher_chunk must be at least 1, or None for all images at once; got {self.teacher_chunk}",
        )
        check(self.decoder_depth >= 1, f"decoder_depth must be at least 1, got {self.decoder_depth}")
        check(self.decoder_layer_scale >= 0, f"decoder_layer_scale must not be negative: {self.decoder_layer_scale}")
        check(self.mixup >= 0 and self.cutmix >= 0, "mixup and cutmix must not be negative")
        weak = self.decoder != "transformer"
        check(
            not weak or (self.target == "last_cls" and self.masking in ("block", "reversed_block")),
            f"the {self.decoder} decoder has one output per view: it needs target last_cls and block masks, got target "
            f"{self.target} and {self.masking} masks; add --maskembed.target last_cls --maskembed.masking block",
        )
        check(
            self.loss_on == "all" or self.target != "last_cls",
            f"loss_on {self.loss_on} chooses among patches, but target last_cls has none; use --maskembed.loss-on all",
        )
