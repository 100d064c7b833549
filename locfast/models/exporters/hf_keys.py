"""Names of weights in transformers' CLIP and SigLIP vision towers, from timm's and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from locfast.errors import UserError
from locfast.models.attention import timm_class
from locfast.models.backbone import Backbone

Kind = Literal["clip", "siglip"]

PREFIX = "vision_model."
"""Of every key in transformers 4, which 5 still reads."""

PAIRS = {
    "pos_embed": "embeddings.position_embedding.weight",
    "cls_token": "embeddings.class_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
}
IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
QKV = ("q_proj", "k_proj", "v_proj")

ACTIVATIONS: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}
"""By transformers' names."""


def timm_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a timm ViT as transformers names it: q, k and v apart, position and CLS without a batch axis.

    Attention pooling and heads, which no alignment trains, are left out.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith(("attn_pool.", "fc_norm.", "head.")):
            continue
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            layer = f"encoder.layers.{index}."
            name, _, leaf = rest.rpartition(".")
            if name == "attn.qkv":
                parts = tensor.chunk(3)
                out.update(
                    {f"{PREFIX}{layer}self_attn.{part}.{leaf}": value for part, value in zip(QKV, parts, strict=True)}
                )
            else:
                out[f"{PREFIX}{layer}{IN_BLOCK[name]}.{leaf}"] = tensor
        elif key in PAIRS:
            out[PREFIX + PAIRS[key]] = tensor.flatten() if key == "cls_token" else tensor[0]
        else:
            name, _, leaf = key.rpartition(".")
            out[f"{PREFIX}{PAIRS[name]}.{leaf}"] = tensor
    return {key: tensor.contiguous().clone() for key, tensor in out.items()}


def hf_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: a CLIP or SigLIP vision tower's state dict, of transformers 4 or 5, under timm's names.

    Text towers, projections, position ids and SigLIP's pooling head are left out.
    """
    outside = {new: old for old, new in PAIRS.items()}
    inside = {new: old for old, new in IN_BLOCK.items()}
    bare = {key.removeprefix(PREFIX): value for key, value in state.items()}
    out: dict[str, Tensor] = {}
    for key, tensor in bare.items():
        name, _, leaf = key.rpartition(".")
        if key.startswith("encoder.layers."):
            _, _, index, rest = name.split(".", 3)
            if rest in inside:
                out[f"blocks.{index}.{inside[rest]}.{leaf}"] = tensor
            elif rest == "self_attn.q_proj":
                parts = [bare[f"encoder.layers.{index}.self_attn.{part}.{leaf}"] for part in QKV]
                out[f"blocks.{index}.attn.qkv.{leaf}"] = torch.cat(parts)
        elif key in outside:
            out[outside[key]] = tensor[None, None] if outside[key] == "cls_token" else tensor[None]
        elif name in outside:
            out[f"{outside[name]}.{leaf}"] = tensor
    return out


def tower_kind(backbone: Backbone, target: str) -> Kind:
    """Which of transformers' towers computes what `backbone` does. Raises UserError where none does."""
    model = backbone.model
    has_norm_pre = isinstance(getattr(model, "norm_pre", None), nn.LayerNorm)
    conv_bias = model.patch_embed.proj.bias is not None
    looks: Kind | None = None
    if backbone.num_prefix_tokens == 1 and has_norm_pre and not conv_bias:
        looks = "clip"
    elif backbone.num_prefix_tokens == 0 and not isinstance(model.norm_pre, nn.LayerNorm) and conv_bias:
        looks = "siglip"
    block: Any = backbone.blocks[0]
    known = (
        backbone.family == "vit"
        and type(block) is vision_transformer.Block
        and timm_class(block.attn) is vision_transformer.Attention
    )
    tokens = backbone.num_tokens
    fits = known and looks is not None and model.pos_embed is not None and model.pos_embed.shape[1] == tokens
    state = model.state_dict()
    extra = [key for key in state if ".ls" in key or "q_norm" in key or "attn.norm" in key or ".gate" in key]
    eps = {
        module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and "pool" not in name
    }
    square = backbone.image_size[0] == backbone.image_size[1] and backbone.patch_size[0] == backbone.patch_size[1]
    whole = backbone.head_dim * backbone.num_heads == backbone.embed_dim and backbone.qkv_bias
    if not (fits and looks and square and whole and len(eps) == 1 and backbone.has_final_norm) or extra:
        raise UserError(
            f"--to {target}: {backbone.name} is a {type(model).__name__} that neither of transformers' CLIPVisionModel "
            "and SiglipVisionModel computes. They take OpenAI's, OpenCLIP's and DFN's CLIP (vit_*_clip_*) and SigLIP "
            "(vit_*_siglip_*), not DINOv2, EVA-02, BEiT, MAE or classifiers. Type --to timm, or for a VLM --to "
            "prismatic."
        )
    return looks


def activation_name(act: nn.Module, target: str) -> str:
    """transformers' name of an activation, found by its values: timm has more than one class for some."""
    x = torch.linspace(-6, 6, 201)
    with torch.no_grad():
        for name, function in ACTIVATIONS.items():
            # GELU and its tanh form lie 5e-4 apart, GELU and QuickGELU 0.02.
            if torch.allclose(act(x.clone()), function(x), atol=1e-5, rtol=0):
                return name
    raise UserError(
        f"--to {target}: the model's activation {type(act).__name__} is none of {', '.join(ACTIVATIONS)}. Type --to "
        "timm."
    )
