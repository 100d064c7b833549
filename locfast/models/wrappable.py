"""Which of timm's networks a Backbone can wrap: told before anything is built upon one that it cannot."""

from __future__ import annotations

import logging
from typing import Any

from timm.layers import PatchEmbed
from timm.models import beit, eva, vision_transformer
from torch import nn

from locfast.errors import UserError

FAMILIES: dict[str, type[nn.Module]] = {
    "vit": vision_transformer.VisionTransformer,
    "eva": eva.Eva,
    "beit": beit.Beit,
}
"""timm's model classes that a Backbone can wrap: classifiers, CLIP, SigLIP, MAE, DINO, ...; EVA-02; BEiT."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""How images may be resampled, by timm's names."""

log = logging.getLogger(__name__)


def family_of(model: nn.Module, name: str) -> str:
    """The key in FAMILIES of the model called `name`; UserError where it is none of them."""
    sequential = all(hasattr(block, "attn") and hasattr(block, "mlp") for block in getattr(model, "blocks", ()))
    for family, kind in FAMILIES.items():
        if isinstance(model, kind) and sequential:
            return family
    blocks = "" if sequential else " with parallel branches in its blocks"
    raise UserError(
        f"--model {name} is a {type(model).__name__}{blocks}. locfast needs one token a patch through blocks of one "
        f"attention and one MLP, which timm's {', '.join(kind.__name__ for kind in FAMILIES.values())} have. Choose "
        "one of those, for example vit_base_patch16_224 or vit_large_patch14_clip_quickgelu_336.openai."
    )


def check_image_size(backbone: Any, asked: int) -> None:
    """Raise UserError unless a Backbone's whole image lies in patches at a side of `asked` pixels.

    A side that is no multiple of the patch loses pixels; SO400M/14 at 384 px does so by its makers' choice.
    """
    own = backbone.model.pretrained_cfg["input_size"][-2:]
    lost = max(asked % patch for patch in backbone.patch_size)
    if lost and tuple(own) != (asked, asked):
        patch = max(backbone.patch_size)
        below = asked - asked % patch
        raise UserError(
            f"--image-size {asked}: {backbone.name} has patches of {patch} px, so {lost} px of every side would be in "
            f"none. Type --image-size {below} or {below + patch}."
        )


def interpolation_of(name: str, model: str) -> str:
    """The resampling of the model's evaluation images; bicubic where its config names none that there is."""
    if name in INTERPOLATIONS:
        return name
    log.warning("%s: its config asks for the interpolation %r, which locfast lacks; taking bicubic", model, name)
    return "bicubic"


def check_patch_embed(embed: Any, name: str) -> None:
    """Raise UserError unless a patch is embedded from its own pixels alone."""
    conv: Any = getattr(embed, "proj", None)
    plain = isinstance(embed, PatchEmbed) and isinstance(conv, nn.Conv2d)
    if not (plain and conv.kernel_size == conv.stride and conv.padding == (0, 0) and not embed.dynamic_img_pad):
        raise UserError(
            f"--model {name} has the stem {type(embed).__name__}, whose patches overlap or pass through other layers. "
            "A hidden patch must not be seen by its neighbours, so locfast needs one convolution with kernel = stride. "
            "Choose a model with a plain patch embedding, for example vit_base_patch16_224."
        )
