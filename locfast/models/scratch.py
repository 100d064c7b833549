"""A backbone from nothing, as MAE starts one: its weights, its fixed positions, and ImageNet's colours."""

from __future__ import annotations

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.models.backbone import Backbone

TOKEN_STD = 0.02
LONGEST_PERIOD = 10000.0


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed position embeddings of a grid of patches: [N, C], patches row by row.

    The first half of the width tells the column, the second the row, each as sines and then cosines of frequencies
    from 1 down to 1/10000. Raises ValueError where the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, got {width}")
    frequency = LONGEST_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Linear layers as MAE starts them: Xavier-uniform weights and no biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def start_from_scratch(backbone: Backbone) -> Backbone:
    """Draw a backbone's weights anew, in place, from torch's generator; it takes ImageNet's mean and deviation.

    The patch embedding starts like the linear layer that it is, prefix tokens with a deviation of 0.02. No licence or
    hub id of the pretrained weights, which are not used, stays in its config.
    """
    initialise(backbone.model)
    embed = backbone.model.patch_embed.proj
    nn.init.xavier_uniform_(embed.weight.flatten(1))  # a view: the weight itself is filled
    if embed.bias is not None:
        nn.init.zeros_(embed.bias)
    for name in ("cls_token", "reg_token"):
        token = getattr(backbone.model, name, None)
        if token is not None:
            nn.init.normal_(token, std=TOKEN_STD)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    backbone.mean, backbone.std = mean, std
    backbone.model.pretrained_cfg.update(mean=mean, std=std, tag=None, hf_hub_id=None, license=None)
    return backbone


@torch.no_grad()
def fix_positions(backbone: Backbone) -> Backbone:
    """Give a backbone fixed sin-cos positions, in place; prefix tokens get none.

    Raises UserError where it has no absolute positions, or a width that is no multiple of 4.
    """
    position = getattr(backbone.model, "pos_embed", None)
    if not isinstance(position, nn.Parameter) or backbone.embed_dim % 4:
        why = f"a width of {backbone.embed_dim}" if backbone.embed_dim % 4 else "no absolute position embeddings"
        raise UserError(
            f"fixed sin-cos positions, the default from scratch, do not fit {backbone.name}, which has {why}; use the "
            "model's own: --lut.positions model"
        )
    patches = sincos_positions(backbone.grid, backbone.embed_dim)
    position.zero_()
    position[0, -len(patches) :] = patches
    position.requires_grad_(False)
    return backbone
