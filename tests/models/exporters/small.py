"""Small students of several families, and what a MaskEmbed run keeps beside them, their weights stirred."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locfast.models.backbone import Backbone, load_backbone
from locfast.models.decoder import TransformerDecoder
from locfast.models.student import make_student

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 64, "num_heads": 4}
CAP = 2.0
"""Low enough for the logits of so small a model to reach it."""

KINDS = {
    "clip_quickgelu": ("vit_base_patch16_clip_quickgelu_224.openai", {**SMALL, "img_size": 64}),
    "clip_gelu": ("vit_base_patch16_clip_224.laion2b", {**SMALL, "img_size": 64}),
    "siglip": ("vit_base_patch16_siglip_224.webli", {**SMALL, "img_size": 64}),
    "dinov2_reg": ("vit_base_patch14_reg4_dinov2.lvd142m", {**SMALL, "img_size": 56}),
    "eva02": ("eva02_base_patch16_clip_224.merged2b", {**SMALL, "img_size": 64}),
    "eva_fused": ("eva_giant_patch14_clip_224.laion400m", {**SMALL, "img_size": 56}),
    "beit": ("beit_base_patch16_224.in22k_ft_in22k_in1k", {**SMALL, "img_size": 64}),
    "classifier": ("vit_tiny_patch16_224.augreg_in21k", {**SMALL, "img_size": 64}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On two cores that others use, two threads wait 8 ms for each other in every product of models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stir(module: nn.Module, seed: int = 0) -> None:
    """Change every weight, so that LayerScale, biases, norms and positions count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def student(kind: str, **changed: Any) -> Backbone:
    return copy.deepcopy(_student(kind, tuple(changed.items())))


@functools.cache  # timm's initialisation of one takes 0.2 s
def _student(kind: str, changed: tuple[tuple[str, Any], ...]) -> Backbone:
    name, args = KINDS[kind]
    backbone = load_backbone(name, pretrained=False, **{**args, **dict(changed)})
    backbone = make_student(backbone, new_norm=True, new_last_block=False)
    stir(backbone)
    return backbone.eval()


def artifacts(backbone: Backbone, head: str = "linear", depth: int = 2) -> dict[str, Any]:
    """As MaskEmbed's own, of an untrained run."""
    width = backbone.embed_dim
    last = nn.Linear(width, width)
    decoder = TransformerDecoder(backbone, depth, 1e-6)
    parts = nn.ModuleList(
        [decoder, last if head == "linear" else nn.Sequential(nn.Linear(width, width), nn.GELU(), last)]
    )
    stir(parts, seed=1)
    return {"backbone": backbone, "softcap": CAP, "decoder": decoder.eval(), "head": parts[1].eval()}


def noise(backbone: Backbone, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))
