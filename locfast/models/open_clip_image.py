"""The image tower of an open_clip model as a timm backbone: what locfast computes, compiles and exports."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.models.create import create_timm_model
from locfast.models.heads import as_timm_names
from locfast.models.image_tower import with_projection
from locfast.models.joint import JointTower

SIZES = {768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1664: "gigantic"}
"""timm's words for the widths of CLIP's towers."""


class _Recipe(NamedTuple):
    """What builds a tower in timm: architecture and arguments, and its weights by names that timm converts."""

    architecture: str
    args: dict[str, Any]
    state: dict[str, Tensor]


def open_clip_image_tower(
    visual: Any, name: str, *, image_size: int | None = None, flag: str = "--clip.text"
) -> JointTower:
    """`visual`, the image tower of open_clip's model `name`, in timm's modules, with its weights and its projection.

    CLIP's own VisionTransformer with a CLS token, and timm's trunks with a CLS token and a linear layer (EVA-02 CLIP).
    image_size: position embeddings are resampled. flag: what the name was typed after. Raises UserError for others.
    """
    recipe = _recipe(visual)
    if recipe is None:
        raise UserError(
            f"--model open_clip with {flag} {name}: its image tower ({type(visual).__name__}) has no CLS token "
            "with a linear projection behind it, as CLIP (ViT-B-16, ViT-L-14, ...) and EVA-02 CLIP have. Name one of "
            "those, or a timm model with a CLS token as --model."
        )
    model = create_timm_model(recipe.architecture, False, image_size=image_size, **recipe.args)
    state = {key: tensor.detach() for key, tensor in as_timm_names(recipe.state, model).items()}
    weight = state.pop("head.weight")
    bias = state.pop("head.bias", torch.zeros(len(weight)))
    head = nn.Linear(weight.shape[1], len(weight))
    head.load_state_dict({"weight": weight, "bias": bias})
    model.load_state_dict(state)
    seen = visual.preprocess_cfg
    looks = {"mean": seen["mean"], "std": seen["std"], "interpolation": seen["interpolation"], "crop_pct": 1.0}
    model.pretrained_cfg.update(tag=None, hf_hub_id=None, license=None, **looks)
    return with_projection(model, f"open_clip's {name}", head)


def _recipe(visual: Any) -> _Recipe | None:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer) and _is_plain(visual):
        state = {f"visual.{key}": tensor for key, tensor in visual.state_dict().items()}
        return _Recipe(*_architecture(visual), state)
    if not isinstance(visual, TimmModel):
        return None
    trunk: Any = visual.trunk
    # a norm of the pooled CLS token alone is one of all tokens, of which CLS is then taken
    state = {key.replace("fc_norm.", "norm."): tensor for key, tensor in trunk.state_dict().items()}
    behind = {key.removeprefix("proj."): tensor for key, tensor in visual.head.state_dict().items()}
    if set(behind) <= {"weight", "bias"}:
        state |= {f"head.{key}": tensor for key, tensor in behind.items()}
    if getattr(trunk, "global_pool", None) != "token" or "head.weight" not in state:
        return None
    args = {"global_pool": "token", "img_size": trunk.patch_embed.img_size}
    return _Recipe(trunk.pretrained_cfg["architecture"], args, state)


def _is_plain(visual: Any) -> bool:
    """Whether timm computes open_clip's VisionTransformer: CLS behind the last norm, plain blocks, a projection."""
    block = visual.transformer.resblocks[0]
    scaled = not isinstance(getattr(block, "ls_1", nn.Identity()), nn.Identity)
    pooled = visual.pool_type == "tok" and visual.attn_pool is None and not visual.final_ln_after_pool
    plain = type(block).__name__ == "ResidualAttentionBlock" and not scaled
    normed = isinstance(visual.ln_pre, nn.LayerNorm) and isinstance(visual.patch_dropout, nn.Identity)
    return pooled and plain and normed and visual.proj is not None


def _architecture(visual: Any) -> tuple[str, dict[str, Any]]:
    """timm's name for a CLIP of that width and patch, and arguments for what the name leaves open."""
    block = visual.transformer.resblocks[0]
    width, patch = visual.conv1.out_channels, visual.patch_size[0]
    quick = "_quickgelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else ""
    name = f"vit_{SIZES.get(width, 'base')}_patch{patch}_clip{quick}_224"
    args = {
        "img_size": visual.image_size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
    }
    return name if timm.is_model(name) else f"vit_base_patch16_clip{quick}_224", args
