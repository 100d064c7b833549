"""Towers that put every token of an image into a joint space of images and texts: CLIP's, from timm or open_clip."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from locfast.errors import UserError
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.heads import file_width, is_classifier
from locfast.models.open_clip_model import load_open_clip
from locfast.models.wrappable import FAMILIES

OPEN_CLIP = "open_clip:"
Size = tuple[int, int]
Colour = tuple[float, float, float]

log = logging.getLogger(__name__)


class JointTower(nn.Module):
    """A backbone whose head, timm's `head`, is a linear way from every token to the joint space.

    B images, P prefix tokens, N patches, T = P + N; E is the width of the joint space. Token 0 is the CLS token, whose
    embedding stands for the image.
    """

    def __init__(self, backbone: Backbone, joint_dim: int) -> None:
        super().__init__()
        self.backbone, self.joint_dim = backbone, joint_dim
        self.image_size, self.grid = backbone.image_size, backbone.grid
        self.num_prefix_tokens = backbone.num_prefix_tokens
        self.mean, self.std, self.interpolation = backbone.mean, backbone.std, backbone.interpolation

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalised -> [B, T, E]."""
        return self.project(self.backbone(images))

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens behind the final norm [..., C] -> [..., E]."""
        return self.backbone.model.head(tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T, C], behind the final norm -> [B, E], the images' embeddings."""
        return self.project(tokens[:, 0])


class OpenClipTower(nn.Module):
    """An image tower of open_clip's own VisionTransformer: the teacher's half of `JointTower`."""

    def __init__(self, visual: Any, mean: Colour, std: Colour, interpolation: str) -> None:
        super().__init__()
        self.visual = visual
        self.image_size: Size = tuple(visual.image_size)
        self.grid: Size = tuple(visual.grid_size)
        self.num_prefix_tokens, self.joint_dim = 1, visual.output_dim
        self.mean, self.std, self.interpolation = mean, std, interpolation

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalised -> [B, 1 + N, E]: norm and projection of every token, not of CLS alone."""
        visual = self.visual
        tokens = visual.ln_post(visual.transformer(visual._embeds(images)))
        return tokens if visual.proj is None else tokens @ visual.proj


Tower = JointTower | OpenClipTower


def load_tower(name: str, pretrained: bool = True, *, projection: str = "auto", seed: int = 0, flag: str) -> Tower:
    """A CLIP image tower with its projection, in evaluation mode.

    name: what `load_backbone` takes, or open_clip:NAME@TAG. projection: as `--uta.projection`. flag: what the name was
    typed after, for errors. Raises UserError for names that lead to no tower, and for towers that pool otherwise than
    by a CLS token behind the final norm: their projection says nothing of a single token.
    """
    if name.startswith(OPEN_CLIP):
        model, _, weights = name.removeprefix(OPEN_CLIP).partition("@")
        if not weights:
            raise UserError(f"{flag} {name}: give the weights too, {OPEN_CLIP}{model}@TAG or @FILE.")
        clip, _ = load_open_clip(model, weights if pretrained else "none", seed=seed, flags=(flag, flag))
        return _of_open_clip(clip.visual, name, flag).eval()
    if projection == "auto" and is_classifier(name):
        raise UserError(
            f"{flag} {name}: these weights of timm's were fine-tuned to name classes, so that the head is no way into "
            "a joint space of images and texts. Name CLIP's own, for example vit_base_patch16_clip_224.laion2b or "
            "vit_large_patch14_clip_quickgelu_224.openai, or type --uta.projection none for tokens behind the norm."
        )
    file = Path(name.partition("@")[2]).expanduser()
    heads = 0 if projection == "none" else file_width(name) if file.is_file() else None
    backbone = load_backbone(name, pretrained, seed=seed, num_classes=heads)
    architecture = str(backbone.model.pretrained_cfg.get("architecture", name))
    if projection == "auto" and "clip" not in architecture:
        if isinstance(backbone.model.head, nn.Linear):
            log.info("%s: tokens behind its norm are the targets, and not through its head of %d outputs; "
                     "--uta.projection head takes that", name, backbone.model.head.out_features)  # fmt: skip
        backbone.model.head = nn.Identity()
    tower = joint_tower(backbone, name, flag)
    if projection == "head" and not isinstance(backbone.model.head, nn.Linear):
        raise UserError(f"{flag} {name} has no head to project with. Type --uta.projection none.")
    return tower.eval()


def joint_tower(backbone: Backbone, name: str, flag: str) -> JointTower:
    """A backbone and its own head as a JointTower; UserError where that head does not read a CLS token."""
    model = backbone.model
    behind = [
        part for part in ("attn_pool", "fc_norm") if not isinstance(getattr(model, part, None), nn.Identity | None)
    ]
    if not has_cls(backbone) or behind or not backbone.has_final_norm:
        kind = (
            f"pools by {behind[0]}" if behind else "has no CLS token" if not has_cls(backbone) else "has no final norm"
        )
        raise UserError(
            f"{flag} {name} {kind}. A joint space of single tokens needs a CLS token behind the final norm and "
            "a linear projection, as the towers of CLIP have, for example vit_large_patch14_clip_quickgelu_224.openai."
        )
    head = model.head
    return JointTower(backbone, head.out_features if isinstance(head, nn.Linear) else backbone.embed_dim)


TEXT_TOWERS = {
    "eva_giant_patch14_clip_224.merged2b": ("EVA01-g-14-plus", "merged2b_s11b_b114k"),
    "eva_giant_patch14_clip_224.laion400m": ("EVA01-g-14", "laion400m_s11b_b41k"),
    "eva02_large_patch14_clip_224.merged2b": ("EVA02-L-14", "merged2b_s4b_b131k"),
    "vit_large_patch14_clip_quickgelu_224.openai": ("ViT-L-14", "openai"),
    "vit_base_patch16_clip_quickgelu_224.openai": ("ViT-B-16", "openai"),
}
"""Of timm's image towers that UTA may learn from: open_clip's name and tag of both towers."""


def text_tower_of(name: str) -> dict[str, str] | None:
    """The open_clip model and weights whose text tower shares the joint space of tower `name`, where that is known."""
    model, _, weights = name.removeprefix(OPEN_CLIP).partition("@")
    if name.startswith(OPEN_CLIP):
        return {"model": model, "pretrained": weights}
    found = TEXT_TOWERS.get(name)
    return None if found is None else {"model": found[0], "pretrained": found[1]}


def pool_by_cls(backbone: Backbone) -> Backbone:
    """Make a model that averages its patches before a norm (EVA-02, BEiT) one whose CLS token stands behind that norm.

    In place; the norm is new. As timm builds the model for global_pool="token".
    """
    model = backbone.model
    if not backbone.has_final_norm and has_cls(backbone):
        model.norm, model.fc_norm = nn.LayerNorm(backbone.embed_dim, eps=backbone.norm_eps), nn.Identity()
        model.global_pool, model._model_args = "token", {**model._model_args, "global_pool": "token"}
    return backbone


def has_cls(backbone: Backbone) -> bool:
    """Whether the first token is a CLS token; registers alone are none."""
    return getattr(backbone.model, "cls_token", None) is not None


def _of_open_clip(visual: Any, name: str, flag: str) -> Tower:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, TimmModel) and isinstance(visual.trunk, tuple(FAMILIES.values())):
        backbone = Backbone(visual.trunk, name)
        config = visual.preprocess_cfg if hasattr(visual, "preprocess_cfg") else {}
        backbone.mean, backbone.std = tuple(config.get("mean", backbone.mean)), tuple(config.get("std", backbone.std))
        tower = joint_tower(backbone, name, flag)
        if len(visual.head):  # open_clip has a projection behind timm's
            last = [layer for layer in visual.head.modules() if isinstance(layer, nn.Linear)][-1]
            backbone.model.head, tower.joint_dim = nn.Sequential(backbone.model.head, visual.head), last.out_features
        return tower
    pools_cls = getattr(visual, "pool_type", None) == "tok" and visual.attn_pool is None
    if isinstance(visual, VisionTransformer) and pools_cls and not visual.final_ln_after_pool:
        config = visual.preprocess_cfg
        return OpenClipTower(visual, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])
    raise UserError(
        f"{flag} {name}: its image tower ({type(visual).__name__}) does not project a CLS token behind a final norm, "
        "so its projection says nothing of a single token. Give another, for example open_clip:ViT-L-14@openai."
    )
