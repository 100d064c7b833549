"""What a cheaper teacher does to its targets: after every block and after the final norm, against fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from locfast.kernels.select_views import select_views
from locfast.models.backbone import Backbone


@torch.no_grad()
def states(backbone: Backbone, images: Tensor, visible: Tensor, stop: int) -> Iterator[Tensor]:
    """What the teacher holds after blocks 1, 2, .. stop, and last its targets: each [B * V, T, C] in fp32."""
    x = select_views(*backbone.view_rows(images), visible).flatten(0, 1)
    for block in range(stop):
        x = backbone.run_blocks(x, block, block + 1)
        yield x.float()
    yield backbone.final_norm(x).float()


def error(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Of two tensors [..., T, C]: mean and least cosine of their tokens, and relative L2 distance over all."""
    cosine = torch.cosine_similarity(found.double(), exact.double(), dim=-1)
    relative = ((found.double() - exact.double()).norm() / exact.double().norm()).item()
    return {"cosine": cosine.mean().item(), "least_cosine": cosine.min().item(), "relative": relative}


def errors(
    exact: Backbone, backbone: Backbone, images: Tensor, visible: Tensor, stop: int, bf16: bool
) -> list[dict[str, float]]:
    """`error` after every block, and of the targets: what `backbone`, under bf16 autocast or not, is off `exact`."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        found = list(states(backbone, images, visible, stop))
    return [error(one, other) for one, other in zip(found, states(exact, images, visible, stop), strict=True)]
