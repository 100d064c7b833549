"""A locality-aligned CLIP or SigLIP tower for transformers and LLaVA. Written by locfast, which it does not need.

    tower = load_tower(FOLDER)                      # CLIPVisionModel or SiglipVisionModel, under its soft cap
    features = tower_features(tower, pixel_values)  # [B, T, C]: the last block behind the final norm

transformers' CLIP tower hands out tokens from before the final norm, which it applies to the pooled CLS token alone,
and LLaVA takes them one block earlier. Alignment trained what stands behind the norm, so take the tokens from here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPVisionModel, SiglipVisionModel

try:
    from transformers import AttentionInterface
except ImportError:  # an old transformers, such as the 4.37 that LLaVA pins: the cap goes into the modules
    AttentionInterface = None  # type: ignore[assignment, misc]

TOWERS: dict[str, Any] = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, T, D] -> [B, T, H, D], and the weights [B, H, T, T].

    Logits in fp32: in bf16 those near a cap of 30 would lie 0.125 apart.
    """
    with torch.autocast(q.device.type, enabled=False):
        logits = softcap * torch.tanh((q.float() @ k.float().transpose(-2, -1)) * scale / softcap)
    weights = (logits if mask is None else logits + mask).softmax(dim=-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights


def register_softcap(softcap: float) -> str:
    """Make a capped attention known to transformers; returns its name, for `attn_implementation`.

    `attn_implementation="locfast_softcap_30"` is 30 * tanh(logits / 30).
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return softcapped_attention(query, key, value, scale, softcap, attention_mask)

    name = f"locfast_softcap_{softcap:g}"
    AttentionInterface.register(name, attention)
    return name


def cap_modules(tower: Any, softcap: float) -> None:
    """Put the cap into every attention of a tower, for a transformers that has no registry of attentions."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, _ = softcapped_attention(q, k, v, q.shape[-1] ** -0.5, softcap)
        return self.out_proj(out.flatten(2)), None

    for layer in getattr(tower, "vision_model", tower).encoder.layers:
        layer.self_attn.forward = MethodType(forward, layer.self_attn)


def load_tower(folder: str | Path, **kwargs: Any) -> Any:
    """The tower in `folder`, in eval mode, under the soft cap that it was trained with.

    kwargs: for `from_pretrained` (torch_dtype, device_map, ...). Raises ValueError where a weight is missing, which
    transformers would make up.
    """
    aligned = _read(folder, "aligned.json")
    softcap = aligned["softcap"]
    kind = TOWERS[_read(folder, "config.json")["model_type"]]
    registry = _reads_registry(kind)
    if softcap is not None and registry:
        kwargs["attn_implementation"] = register_softcap(softcap)
    tower, info = kind.from_pretrained(str(folder), output_loading_info=True, **kwargs)
    missing = [key for key in info["missing_keys"] if not _is_pooling_head(key, tower)]
    if wrong := [*missing, *info["mismatched_keys"], *info["unexpected_keys"]]:
        raise ValueError(f"{folder} does not hold a whole {kind.__name__}: {sorted(map(str, wrong))[:5]}")
    body = getattr(tower, "vision_model", tower)
    if len(missing) < len(info["missing_keys"]):
        body.head = nn.Identity()  # made up by a transformers that cannot leave it out, such as 4.37
    if softcap is not None and not registry:
        cap_modules(tower, softcap)
    tower.aligned = aligned
    return tower.eval()


def _reads_registry(kind: Any) -> bool:
    """Whether the towers of this class look their attention up: in 4.51 SigLIP's do, and CLIP's do not yet."""
    return AttentionInterface is not None and hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS")


def _is_pooling_head(key: str, tower: Any) -> bool:
    return isinstance(tower, SiglipVisionModel) and key.removeprefix("vision_model.").startswith("head.")


def tower_features(tower: Any, pixel_values: Tensor, *, norm: bool | None = None, prefix: bool | None = None) -> Tensor:
    """pixel_values [B, 3, H, W], as the image processor makes them -> [B, T or N, C].

    Tokens of the last block behind the final norm, CLS first; otherwise where aligned.json, or norm and prefix, say so.
    """
    body = getattr(tower, "vision_model", tower)  # transformers 4 has it one module deeper
    layers = body.encoder.layers
    prefix_tokens = int(hasattr(body.embeddings, "class_embedding"))
    aligned = getattr(tower, "aligned", {"blocks": len(layers), "norm": True, "prefix": True})
    last: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    # A hook, as versions differ in whether the last of `hidden_states` is before the norm or behind it.
    handle = layers[aligned["blocks"] - 1].register_forward_hook(keep)
    try:
        tower(pixel_values)
    finally:
        handle.remove()
    tokens = body.post_layernorm(last[0]) if (aligned["norm"] if norm is None else norm) else last[0]
    return tokens if (aligned["prefix"] if prefix is None else prefix) else tokens[:, prefix_tokens:]


class AlignedTower(nn.Module):
    """The tower as LLaVA's CLIPVisionTower is used: same arguments, attributes and `forward`.

    vision_tower: the folder of an export by `python -m locfast.export RUN --to llava`. LLaVA's settings of layer and of
    feature are not read: aligned.json says what the adapter was exported for.
    """

    def __init__(self, vision_tower: str | Path, args: Any = None, delay_load: bool = False) -> None:
        super().__init__()
        self.vision_tower_name = str(vision_tower)
        self.aligned = _read(vision_tower, "aligned.json")
        self.cfg_only = TOWERS[_read(vision_tower, "config.json")["model_type"]].config_class.from_pretrained(
            vision_tower
        )
        self.is_loaded = False
        if not delay_load or getattr(args, "unfreeze_mm_vision_tower", False):
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        if not self.is_loaded:
            self.image_processor = AutoImageProcessor.from_pretrained(self.vision_tower_name)
            self.vision_tower = load_tower(self.vision_tower_name, device_map=device_map).requires_grad_(False)
            self.is_loaded = True

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor]) -> Any:
        """images [B, 3, H, W] -> [B, tokens, C]; a list of [3, H, W] -> a list of [1, tokens, C]."""
        if isinstance(images, list):
            return [self.forward(image.unsqueeze(0)) for image in images]
        return tower_features(self.vision_tower, images.to(self.device, self.dtype)).to(images.dtype)

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> Any:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


def _read(folder: str | Path, name: str) -> dict[str, Any]:
    return json.loads(Path(folder, name).read_text(encoding="utf-8"))
