"""An image tower of a joint space: a backbone's CLS token and a linear projection."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.checkpoint_file import find_weights
from locfast.models.create import seeded

State = dict[str, Tensor]


class ImageTower(nn.Module):
    """images [B, 3, H, W], normalised -> embeddings [B, E], not normalised: the CLS token, projected."""

    def __init__(self, backbone: Backbone, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.checkpointing = False
        # stochastic depth is of this training, and no part of the architecture that an export names
        backbone.model._model_args.pop("drop_path_rate", None)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(self.backbone(images, checkpointing=self.checkpointing))

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens behind the final norm [B, T, C] -> [B, E]."""
        return self.head(tokens[:, 0])


def load_image_tower(
    name: str,
    width: int,
    pretrained: bool = True,
    *,
    new_head: bool = False,
    drop_path: float = 0.0,
    seed: int = 0,
    image_size: int | None = None,
) -> ImageTower:
    """The backbone `name`, as `load_backbone` finds it, and its own projection to `width`, or a new one.

    Models with a projection of their own are timm folders and checkpoint files of a model with a head, and timm's CLIP
    models that are no classifiers. new_head: a new one all the same. Raises UserError where its own has another
    width, and for a model without a CLS token.
    """
    drops: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    backbone = load_backbone(name, pretrained, seed=seed, image_size=image_size, **drops)
    if getattr(backbone.model, "cls_token", None) is None:
        raise UserError(
            f"--model {name} has no CLS token, which is what an image's embedding is projected from. "
            "Choose a model with one: a CLIP, an EVA-02 CLIP, or a vit_* classifier."
        )
    head = new_projection(backbone.embed_dim, width, seed)
    own = None if new_head else _own_width(name, backbone)
    if own is not None and own != width:
        raise UserError(
            f"--model {name} projects to {own} dimensions, and the text tower has {width}. Name the text tower that it "
            "was trained with (--clip.text), or type --clip.projection new."
        )
    if own is not None and pretrained:
        head.load_state_dict(_own_head(name))
    return ImageTower(backbone, head)


def new_projection(width: int, joint: int, seed: int) -> nn.Linear:
    """A linear layer whose weights have deviation 1 / sqrt(width), as CLIP's start, and whose bias is zero."""
    with seeded(seed):
        head = nn.Linear(width, joint)
        nn.init.normal_(head.weight, std=width**-0.5)
        nn.init.zeros_(head.bias)
    return head


def _folder(name: str) -> Path | None:
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    return folder if folder.is_dir() else None


def _own_width(name: str, backbone: Backbone) -> int | None:
    """Outputs of the projection that the model called `name` comes with, or None."""
    if folder := _folder(name):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("num_classes", config.get("pretrained_cfg", {}).get("num_classes")) or None
    if "@" in name:
        weight = _file_state(name).get("head.weight")
        return None if weight is None else len(weight)
    is_clip = "_clip_" in name and "_ft_" not in name
    return (backbone.model.pretrained_cfg["num_classes"] or None) if is_clip else None


def _own_head(name: str) -> State:
    """Weight and bias of that projection."""
    if folder := _folder(name):
        state = load_state_dict(str(find_weights(folder)), weights_only=True)
    elif "@" in name:
        state = _file_state(name)
    else:
        state = timm.create_model(name, pretrained=True).state_dict()
    if "head.weight" not in state:
        raise UserError(
            f"--model {name}: its config has num_classes, but its weights have no head.weight. Save the model anew, or "
            "type --clip.projection new."
        )
    weight = state["head.weight"]
    return {"weight": weight, "bias": state.get("head.bias", torch.zeros(len(weight)))}


def _file_state(name: str) -> State:
    """The checkpoint of ARCHITECTURE@FILE, with timm's names for its tensors."""
    architecture, _, file = name.partition("@")
    with torch.device("meta"):
        model: Any = timm.create_model(architecture)
    return as_timm_names(load_state_dict(str(Path(file).expanduser()), weights_only=True), model)


def as_timm_names(state: State, model: nn.Module) -> State:
    """A checkpoint as timm's own converter for `model` names it, position embeddings resampled to its grid."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return state if convert is None else convert(state, model)
