"""A locality-aligned image tower in open_clip. Written by locfast, which it does not need.

    model = load_model(FOLDER)                             # an open_clip model, under its soft cap
    features = image_tokens(model.visual, images)          # [B, T, C]: the last block behind the final norm

open_clip loads an image tower without asking whether a key fits, so the loading here does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class SoftcapMultiheadAttention(nn.MultiheadAttention):
    """torch's self-attention with its logits bounded to +-softcap, as open_clip calls it. [B, T, C] -> [B, T, C]."""

    softcap: float

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        product = nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = product.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # Logits in fp32: in bf16 those near a cap of 30 would lie 0.125 apart.
        with torch.autocast(q.device.type, enabled=False):
            logits = (q.float() @ k.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
        out = (self.softcap * torch.tanh(logits / self.softcap)).softmax(dim=-1).to(v.dtype) @ v
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def load_model(folder: str | Path, name: str | None = None, **kwargs: Any) -> Any:
    """An open_clip model whose image tower is the one in `folder`.

    name: one of open_clip's own models of the same image tower; the export's own otherwise, whose text tower is the
    trained one where the folder has a checkpoint of both, and untrained where not. kwargs: for `open_clip.create_model`
    (pretrained="openai" for the text tower that the original had, ...).
    Raises ValueError where the tower does not fit.
    """
    aligned = json.loads(Path(folder, "aligned.json").read_text(encoding="utf-8"))
    both = name is None and aligned["both"]
    if name is None:
        name = aligned["name"]
        open_clip.add_model_config(Path(folder, f"{name}.json"))
    if both:
        kwargs = {"pretrained": str(Path(folder, "open_clip_model.safetensors")), **kwargs}
    model = open_clip.create_model(name, **kwargs)
    before = model.visual.ln_post.bias.detach().clone() if both and hasattr(model.visual, "ln_post") else None
    load_visual(model.visual, folder)
    if before is not None:
        # The checkpoint has the projection's bias in the norm's. Tokens want the norm as it was trained.
        bias = (before - model.visual.ln_post.bias.detach()) @ model.visual.proj.detach()
        model.visual.register_buffer("proj_bias", bias, persistent=False)
        model.visual.register_forward_hook(_add_bias)
    return model


def _add_bias(visual: Any, images: Any, out: Any) -> Any:
    return (out[0] + visual.proj_bias, *out[1:]) if isinstance(out, tuple) else out + visual.proj_bias


def load_visual(visual: Any, folder: str | Path) -> None:
    """Put the weights in `folder` into an open_clip image tower, and the cap on its attention.

    What stands behind the tokens (pooling, projection) stays as it is. Raises ValueError where the rest does not fit.
    """
    aligned = json.loads(Path(folder, "aligned.json").read_text(encoding="utf-8"))
    state = load_file(Path(folder, "visual.safetensors"))
    behind = ("proj", "head.", "trunk.attn_pool.", "trunk.fc_norm.", "trunk.head.")
    own = {key: tuple(value.shape) for key, value in visual.state_dict().items() if not key.startswith(behind)}
    given = {key: tuple(value.shape) for key, value in state.items()}
    if own != given:
        wrong = sorted(key for key in {*own, *given} if own.get(key) != given.get(key))
        raise ValueError(f"{folder} does not fit this image tower: {wrong[:3]}")
    # Weights of one shape fit towers that compute something else, such as GELU's ViT-B-16 in place of QuickGELU's.
    if aligned["tower"] is not None and aligned["tower"] != (found := describe(visual)):
        raise ValueError(
            f"{folder} does not fit this image tower: it was trained as {aligned['tower']}, this is {found}"
        )
    visual.load_state_dict(state, strict=False)
    if aligned["softcap"] is None:
        return
    if hasattr(visual, "trunk"):
        from timm_softcap import set_softcap

        set_softcap(visual.trunk, aligned["softcap"])
        return
    for block in visual.transformer.resblocks:
        block.attn.__class__ = SoftcapMultiheadAttention
        block.attn.softcap = aligned["softcap"]


def describe(visual: Any) -> dict[str, Any]:
    """What of open_clip's VisionTransformer shows in no weight's shape."""
    block = visual.transformer.resblocks[0]
    return {"act": type(block.mlp.gelu).__name__, "heads": block.attn.num_heads, "eps": visual.ln_post.eps}


def image_tokens(visual: Any, images: Tensor) -> Tensor:
    """images [B, 3, H, W], normalised -> [B, T, C], the last block behind the final norm, prefix tokens first."""
    if hasattr(visual, "trunk"):
        return visual.trunk.forward_features(images)
    return visual.ln_post(visual.transformer(visual._embeds(images)))
