"""What the pre-training of every recipe's backbone saw and cost, as published: the constants, each with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from _step_flops import Shape, forward_flops

How = Literal["read", "quoted"]
"""read: the named file or page was opened and says so. quoted: known at second hand, or of a sibling model."""


@dataclass(frozen=True)
class Fact:
    """A published number."""

    value: float
    what: str
    source: str
    how: How


PROFILE = "mlfoundations/open_clip, docs/model_profile.csv"
TOKENS_KEPT = Fact(0.25, "share of patches that MAE's encoder sees", "facebookresearch/mae, PRETRAIN.md", "read")
IN1K = Fact(1.2e6, "images of ImageNet-1k", "Locality Alignment, section 3.3", "read")
IN21K = Fact(12.6e6, "images of ImageNet-21k, as the paper trains on them", "Locality Alignment, section 3.3", "read")
IN22K = Fact(14.2e6, "images of all of ImageNet (its 21k or 22k)", "ImageNet's own count", "quoted")
PAIRS = Fact(400e6, "pairs of CLIP's data", "CLIP's abstract (arXiv 2103.00020), in the Transformers docs", "quoted")
CLIP_EPOCHS = Fact(32, "epochs of CLIP", "CLIP, section 2.5 (arXiv 2103.00020)", "quoted")
HIGH_RES_EPOCHS = Fact(1, "epochs of CLIP L/14 at 336 px after those at 224 px", "CLIP, section 2.5", "quoted")
SIGLIP_HIGH = Fact(40e9, "samples, if SigLIP's were those of SigLIP 2", "SigLIP 2 (arXiv 2502.14786)", "quoted")
SIGLIP_LOW = Fact(18e9, "samples, a low case", "an estimate: no source that was read tells them", "quoted")
LAION = Fact(34e9, "samples (s34B)", "huggingface.co/laion/CLIP-ViT-B-16-laion2B-s34B-b88K; its s explained", "read")
DFN = Fact(12.8e9, "samples", "model card of the sibling huggingface.co/apple/DFN2B-CLIP-ViT-L-14", "quoted")
EVA = Fact(8e9, "samples (s8B)", "huggingface.co/QuanSun/EVA-CLIP, name in the model card", "read")
B16 = Fact(35.13e9, "FLOPs of ViT-B/16's image tower", PROFILE, "read")
B16_TEXT = Fact(5.96e9, "FLOPs of its text tower, 77 tokens", PROFILE, "read")
L14 = Fact(162.03e9, "FLOPs of ViT-L/14's image tower at 224 px", PROFILE, "read")
L14_336 = Fact(381.92e9, "FLOPs of ViT-L/14's image tower at 336 px", PROFILE, "read")
L14_TEXT = Fact(13.3e9, "FLOPs of its text tower, 77 tokens", PROFILE, "read")
SIGLIP_B16 = Fact(35.42e9, "FLOPs of SigLIP B/16's image tower, pooling included", PROFILE, "read")
SIGLIP_B16_TEXT = Fact(11.02e9, "FLOPs of its text tower, 64 tokens", PROFILE, "read")
SO400M = Fact(220.35e9, "FLOPs of SigLIP SO400M/14's image tower at 224 px, pooling included", PROFILE, "read")
SO400M_TEXT = Fact(13.19e9, "FLOPs of its text tower, 16 tokens", PROFILE, "read")
AUGREG_EPOCHS = Fact(300, "epochs on ImageNet-21k", "names of the checkpoints in timm's vision_transformer.py", "read")
AUGREG_STEPS = Fact(20e3, "steps on ImageNet-1k after it", "names of the checkpoints in timm", "read")
AUGREG_BATCH = Fact(512, "images a step of those", "How to train your ViT (arXiv 2106.10270)", "quoted")
BEIT_EPOCHS = Fact(150, "epochs of masked images on ImageNet-22k", "microsoft/unilm, beit/README.md", "read")
BEIT_TUNING = Fact(90, "epochs on ImageNet-22k's labels after it", "microsoft/unilm, beit/README.md", "read")
BEIT2_EPOCHS = Fact(1600, "epochs of masked images on ImageNet-1k", "microsoft/unilm, beit2/PRETRAINING.md", "read")
BEIT2_TUNING = Fact(90, "epochs on ImageNet-21k's labels after it, as BEiT's", "beit/README.md", "quoted")
BEIT2_TOKENIZER = Fact(12, "blocks of the frozen tokenizer, width 768", "microsoft/unilm, beit2/README.md", "read")
MAE_EPOCHS = Fact(1600, "epochs on ImageNet-1k", "MAE (arXiv 2111.06377), of the released weights", "quoted")
MAE_DEPTH = Fact(8, "blocks of MAE's decoder", "MAE (arXiv 2111.06377), section 4", "quoted")
MAE_WIDTH = Fact(512, "width of MAE's decoder", "MAE (arXiv 2111.06377), section 4", "quoted")
MOCO_EPOCHS = Fact(300, "epochs on ImageNet-1k", "facebookresearch/moco-v3, CONFIG.md", "read")
MOCO_CROPS = Fact(2, "crops, each through student and momentum encoder", "MoCo v3 (arXiv 2104.02057)", "quoted")
DINO_EPOCHS = Fact(400, "epochs on ImageNet-1k", "DINO (arXiv 2104.14294), of the released ViT-B/16", "quoted")
DINO_GLOBAL = Fact(2, "full crops, in student and teacher", "facebookresearch/dino, main_dino.py", "read")
DINO_LOCAL = Fact(10, "small crops, in the student", "DINO (arXiv 2104.14294); its script's default is 8", "quoted")
DINO_SIDE = Fact(96, "px of a small crop", "DINO (arXiv 2104.14294)", "quoted")
DINO2_STEPS = Fact(625e3, "steps of the distillation, with registers too", "DINOv2 (arXiv 2304.07193)", "quoted")
DINO2_BATCH = Fact(2048, "images a step", "DINOv2 (arXiv 2304.07193), appendix", "quoted")
DINO2_GLOBAL = Fact(2, "full crops, in student and frozen ViT-g", "DINOv2 (arXiv 2304.07193)", "quoted")
DINO2_LOCAL = Fact(8, "small crops, in the student", "facebookresearch/dinov2, ssl_default_config.yaml", "read")
DINO2_SIDE = Fact(98, "px of a small crop, as for ViT-L", "facebookresearch/dinov2, train/vitl14.yaml", "quoted")
DINO2_TEACHER = Fact(1.1e9, "parameters of the frozen ViT-g", "facebookresearch/dinov2, MODEL_CARD.md", "read")

Cost = Callable[[Shape], float]
"""FLOPs of one sample, given the shapes of the backbone."""


@dataclass(frozen=True)
class Stage:
    """A part of a pre-training: the product of `samples` is how many it saw."""

    samples: tuple[Fact, ...]
    cost: Cost
    constants: tuple[Fact, ...] = ()
    """What `cost` was made of, beside the backbone's own shapes."""

    @property
    def seen(self) -> float:
        product = 1.0
        for fact in self.samples:
            product *= fact.value
        return product


@dataclass(frozen=True)
class Pretraining:
    """What came before locality alignment; `case` tells estimates of the same recipe apart."""

    stages: tuple[Stage, ...]
    note: str
    """How its FLOPs are counted, and what is left out."""
    case: str = ""

    @property
    def samples(self) -> float:
        """Seen in all stages; one image seen twice is two."""
        return sum(stage.seen for stage in self.stages)

    def flops(self, shape: Shape) -> float:
        return sum(stage.seen * stage.cost(shape) for stage in self.stages)

    @property
    def facts(self) -> list[Fact]:
        return [fact for stage in self.stages for fact in (*stage.samples, *stage.constants)]


def towers(samples: tuple[Fact, ...], *forwards: Fact) -> Stage:
    """Networks trained together: three forwards of each a sample."""
    cost = 3 * sum(fact.value for fact in forwards)
    return Stage(samples, lambda shape: cost, forwards)


def trained(*samples: Fact) -> Stage:
    """The backbone alone, at its own size: three forwards a sample."""
    return Stage(samples, lambda shape: 3 * forward_flops(shape))


def crops(
    samples: tuple[Fact, ...], full: Fact, teacher: Cost, small: tuple[Fact, Fact] | None = None, *more: Fact
) -> Stage:
    """Self-distillation: the student trains on all crops, the teacher looks at the full ones.

    small: how many small ones there are, and the px of a side. more: what `teacher` is made of.
    """

    def cost(shape: Shape) -> float:
        student = full.value * forward_flops(shape)
        if small is not None:
            number, side = (int(fact.value) for fact in small)
            student += number * forward_flops(shape, (side // shape.patch_size) ** 2)
        return 3 * student + full.value * teacher(shape)

    return Stage(samples, cost, (full, *(small or ()), *more))


def mae(shape: Shape) -> float:
    """A quarter of the patches through the encoder, all tokens through the decoder."""
    width, tokens = MAE_WIDTH.value, shape.tokens
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    return 3 * (forward_flops(shape, int(TOKENS_KEPT.value * shape.patches)) + 2 * MAE_DEPTH.value * block)


def frozen_giant(shape: Shape) -> float:
    """Two FLOPs a parameter and token: attention's products, a few per cent at 261 tokens, are left out."""
    return 2 * DINO2_TEACHER.value * shape.tokens


CONTRASTIVE = "image and text tower, three forwards each; the loss is left out"
CLIP = (PAIRS, CLIP_EPOCHS)
AUGREG = (
    Pretraining(
        (trained(IN22K, AUGREG_EPOCHS), trained(AUGREG_STEPS, AUGREG_BATCH)),
        "three forwards of the backbone, on ImageNet-21k and then ImageNet-1k; the classifier is left out",
    ),
)


def siglip(image: Fact, text: Fact, note: str = CONTRASTIVE) -> tuple[Pretraining, ...]:
    """The sample count of SigLIP stands in no source that was read: a high and a low case."""
    return tuple(
        Pretraining((towers((samples,), image, text),), note, f"{samples.value / 1e9:.0f}B samples")
        for samples in (SIGLIP_HIGH, SIGLIP_LOW)
    )


PRETRAINING: dict[str, tuple[Pretraining, ...]] = {
    "beit_b16": (
        Pretraining(
            (trained(IN22K, BEIT_EPOCHS), trained(IN22K, BEIT_TUNING)),
            "three forwards of the backbone; tokenizer and fine-tuning on ImageNet-1k are left out",
        ),
    ),
    "beitv2_b16": (
        Pretraining(
            (
                Stage((IN1K, BEIT2_EPOCHS), lambda shape: 4 * forward_flops(shape), (BEIT2_TOKENIZER,)),
                trained(IN22K, BEIT2_TUNING),
            ),
            "three forwards of the backbone and one of the tokenizer's encoder, a ViT-B like it; the tokenizer's own "
            "training and fine-tuning on ImageNet-1k are left out",
        ),
    ),
    "clip_b16": (Pretraining((towers(CLIP, B16, B16_TEXT),), CONTRASTIVE),),
    "clip_l14": (Pretraining((towers(CLIP, L14, L14_TEXT),), CONTRASTIVE),),
    "clip_l14_336": (
        Pretraining(
            (towers(CLIP, L14, L14_TEXT), towers((PAIRS, HIGH_RES_EPOCHS), L14_336, L14_TEXT)),
            f"{CONTRASTIVE}; the last epoch at 336 px",
        ),
    ),
    "dfn_b16": (Pretraining((towers((DFN,), B16, B16_TEXT),), f"{CONTRASTIVE}; so is the filtering network"),),
    "dino_b16": (
        Pretraining(
            (crops((IN1K, DINO_EPOCHS), DINO_GLOBAL, forward_flops, (DINO_LOCAL, DINO_SIDE)),),
            "three forwards of all crops in the student, one of the full crops in the teacher; heads are left out",
        ),
    ),
    "dinov2_reg_b14": (
        Pretraining(
            (crops((DINO2_STEPS, DINO2_BATCH), DINO2_GLOBAL, frozen_giant, (DINO2_LOCAL, DINO2_SIDE), DINO2_TEACHER),),
            "distillation from the frozen ViT-g: three forwards of all crops in the student, one of the full crops in "
            "ViT-g; heads, and the training of ViT-g, are left out",
        ),
    ),
    "eva02_b16": (
        Pretraining((towers((EVA,), B16, B16_TEXT),), f"{CONTRASTIVE}; so are the masked-image and text stages before"),
    ),
    "in1k_b16": AUGREG,
    "in1k_l16": AUGREG,
    "in1k_s16": AUGREG,
    "in1k_t16": AUGREG,
    "mae_b16": (
        Pretraining(
            (Stage((IN1K, MAE_EPOCHS), mae, (TOKENS_KEPT, MAE_DEPTH, MAE_WIDTH)),),
            "three forwards of the encoder over a quarter of the patches and of the decoder over all tokens",
        ),
    ),
    "mocov3_b16": (
        Pretraining(
            (crops((IN1K, MOCO_EPOCHS), MOCO_CROPS, forward_flops),),
            "three forwards of both crops, one more in the momentum encoder; heads are left out",
        ),
    ),
    "openclip_b16": (Pretraining((towers((LAION,), B16, B16_TEXT),), CONTRASTIVE),),
    "siglip_b16": siglip(SIGLIP_B16, SIGLIP_B16_TEXT),
    "siglip_so400m_224": siglip(SO400M, SO400M_TEXT),
    "siglip_so400m_384": siglip(
        SO400M, SO400M_TEXT, f"{CONTRASTIVE}; all samples at 224 px, since no source that was read says how many at 384"
    ),
}
"""Every recipe of the paper's backbones; the demo's teacher is locfast's own."""
