"""The image tower of a joint space that is trained further: a backbone whose head projects its CLS token."""

from __future__ import annotations

from typing import Any

from torch import nn

from locfast.errors import UserError
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.create import seeded
from locfast.models.heads import own_width
from locfast.models.joint import JointTower, joint_tower


def load_image_tower(
    name: str,
    width: int,
    pretrained: bool = True,
    *,
    new_head: bool = False,
    section: str = "clip",
    seed: int = 0,
    image_size: int | None = None,
) -> JointTower:
    """The backbone `name`, as `load_backbone` finds it, and its own projection to `width`, or a new one.

    Models with a projection of their own are timm folders and checkpoint files of a model with a head, and timm's CLIP
    models that are no classifiers. new_head: a new one all the same. section: whose flags an error speaks of. Raises
    UserError where its own has another width, and for a model without a CLS token behind its final norm.
    """
    own = 0 if new_head else own_width(name)
    backbone = load_backbone(name, pretrained, seed=seed, image_size=image_size, num_classes=own)
    if own == 0:
        backbone.model.head = new_projection(backbone.embed_dim, width, seed)
    tower = joint_tower(backbone, name, "--model")
    if tower.joint_dim != width:
        raise UserError(
            f"--model {name} projects to {tower.joint_dim} dimensions, and the text tower has {width}. Name the text "
            f"tower that it was trained with (--{section}.text), or type --{section}.projection new."
        )
    return trained(tower)


def trained(tower: JointTower) -> JointTower:
    """With its projection trained too: a backbone freezes what stands behind its final norm."""
    tower.backbone.model.head.requires_grad_(True)
    return tower


def new_projection(width: int, joint: int, seed: int) -> nn.Linear:
    """A linear layer whose weights have deviation 1 / sqrt(width), as CLIP's start, and whose bias is zero."""
    with seeded(seed):
        head = nn.Linear(width, joint)
        nn.init.normal_(head.weight, std=width**-0.5)
        nn.init.zeros_(head.bias)
    return head


def with_projection(model: Any, name: str, head: nn.Linear) -> JointTower:
    """A timm model without a head, and the projection that becomes it."""
    backbone = Backbone(model, name)
    backbone.model.head = head
    return trained(JointTower(backbone, head.out_features))
