"""The text tower of an open_clip model, and what stands between a backbone's tokens and its joint space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.eval.global_ability.pooling import Embed
from locfast.models.backbone import Backbone
from locfast.models.joint import has_cls
from locfast.models.open_clip_model import load_open_clip
from locfast.models.wrappable import FAMILIES

SAME = 1e-2
"""Relative difference of patch embeddings below which two towers have one origin; half precision gives 5e-4."""


@dataclass(frozen=True)
class TextTower:
    """An open_clip model, on the CPU until it is moved, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any

    @torch.no_grad()
    def classifier(self, names: Sequence[str], templates: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """One unit vector a class, the mean over the prompts' unit vectors: [E, K] fp32, on `device`.

        templates: prompts with {} where the name goes.
        """
        import open_clip

        model = self.model.to(device)
        return open_clip.build_zero_shot_classifier(model, self.tokenizer, names, templates, device=device).float()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], device: torch.device | str = "cpu", batch_size: int = 256) -> Tensor:
        """The unit vector of every text, [K, E] fp32, on the CPU; computed on `device`, where the model stays."""
        model, found = self.model.to(device), []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[start : start + batch_size])).to(device)
            found.append(model.encode_text(tokens, normalize=True).float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def logits(self, embeddings: Tensor, classifier: Tensor) -> Tensor:
        """Image embeddings [M, E] and a classifier [E, K] -> [M, K]: cosines, scaled and shifted as in training."""
        cosine = nn.functional.normalize(embeddings, dim=-1) @ classifier
        bias = getattr(self.model, "logit_bias", None)
        cosine = cosine * self.model.logit_scale.detach().exp().to(cosine)
        return cosine if bias is None else cosine + bias.detach().to(cosine)


def open_text_tower(name: str, pretrained: str, *, seed: int = 0) -> TextTower:
    """An open_clip model by name, or by a config file (.json), in evaluation mode, on the CPU.

    pretrained: a tag of open_clip's, a checkpoint file, or "none" for weights drawn from `seed`. Raises UserError as
    `load_open_clip` does.
    """
    model, tokenizer = load_open_clip(name, pretrained, seed=seed, flags=("--text-model", "--text-pretrained"))
    return TextTower(Path(name).stem if name.endswith(".json") else name, model.requires_grad_(False), tokenizer)


def projection(text: TextTower, backbone: Backbone, name: str) -> Embed:
    """From tokens behind the final norm to the joint space: [B, T, C] -> [B, E], by `text`'s own image tower.

    CLIP: the CLS token times `visual.proj`. Towers that open_clip takes from timm: the trunk's head (SigLIP: attention
    pooling; EVA-02 CLIP: the CLS token and a linear layer) and what open_clip has behind it. Raises UserError for
    other towers, and where `backbone`, called `name`, is another architecture than that tower.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    visual: Any = text.model.visual
    if isinstance(visual, VisionTransformer) and visual.pool_type == "tok" and visual.attn_pool is None:
        if visual.final_ln_after_pool is False and has_cls(backbone):
            blocks = visual.transformer.resblocks
            _check_same(text, backbone, name, visual.conv1, len(blocks))
            return lambda tokens: tokens[:, 0] if visual.proj is None else tokens[:, 0] @ visual.proj.to(tokens)
    elif isinstance(visual, TimmModel) and isinstance(visual.trunk, tuple(FAMILIES.values())):
        trunk: Any = visual.trunk
        _check_same(text, backbone, name, trunk.patch_embed.proj, len(trunk.blocks))
        if backbone.has_final_norm == (not isinstance(trunk.norm, nn.Identity)):
            return lambda tokens: visual.head(trunk.forward_head(tokens))
    raise UserError(
        f"--text-model {text.name} with {name}: the way into a joint space works for CLIP with a CLS token (ViT-B-16, "
        "ViT-L-14-336, ...), for SigLIP and for EVA-02 CLIP, and this pair is none of them. kNN and linear work for "
        "every backbone."
    )


def same_origin(text: TextTower, backbone: Backbone) -> bool:
    """Whether the patch embedding of an unaligned backbone is that of `text`'s image tower."""
    visual = text.model.visual
    theirs = (visual.conv1 if hasattr(visual, "conv1") else visual.trunk.patch_embed.proj).weight.detach().cpu()
    ours = backbone.model.patch_embed.proj.weight.detach().cpu()
    return bool((ours - theirs).norm() <= SAME * theirs.norm())


def _check_same(text: TextTower, backbone: Backbone, name: str, stem: nn.Conv2d, depth: int) -> None:
    theirs = (stem.out_channels, depth, tuple(stem.kernel_size))
    ours = (backbone.embed_dim, backbone.depth, backbone.patch_size)
    if ours != theirs:
        what = "width {}, depth {}, patches of {} px"
        raise UserError(
            f"--text-model {text.name}: its image tower ({what.format(*theirs)}) is not the architecture of {name} "
            f"({what.format(*ours)}), whose features its projection cannot read. Type the open_clip model that {name} "
            "comes from."
        )


def tuned_text_tower(name: str, model: nn.Module) -> TextTower:
    """An open_clip model that was trained further, with the tokenizer of `name`, the model (or config) it comes from.

    Raises UserError where open_clip does not know `name`.
    """
    import open_clip

    known = name
    if name.endswith(".json") and Path(name).is_file():
        open_clip.add_model_config(Path(name))
        known = Path(name).stem
    if known not in open_clip.list_models():
        raise UserError(
            f"the run's text tower comes from {name}, which open_clip {open_clip.__version__} does not know, so it has "
            "no tokenizer. Install the open_clip that trained it, or put its config back where it lay."
        )
    return TextTower(known, model.eval().requires_grad_(False), open_clip.get_tokenizer(known))


def check_open_clip() -> None:
    """Raise UserError where open_clip cannot be imported."""
    try:
        import open_clip  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"text towers are open_clip's, which cannot be imported ({error}). Type pip install 'locfast[open-clip]'"
        ) from None
