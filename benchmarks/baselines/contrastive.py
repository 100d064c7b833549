"""What a user would take instead of region_contrastive_loss: functions of (regions, texts, logit_scale, threshold).

regions and texts are [R, E], logit_scale a scalar tensor, threshold a cosine or None; the result is a scalar. All of
them store R x R logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from baselines._library import library, torch_compile
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


@dataclass(frozen=True)
class Peer:
    """One row of the table."""

    name: str
    load: Callable[[], Loss]
    """Imports what it needs; raises where that is not installed or does not load."""
    filters: bool = True
    """Whether it can leave near-duplicate captions out; those that cannot are measured without a threshold alone."""


class _Product(torch.autograd.Function):
    """a [M, K] @ b [N, K].T on tensor cores, with the result in fp32 and gradients in the dtype of a and b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        if a.device.type == "cuda":
            return torch.mm(a, b.T, out_dtype=torch.float32)
        return a.float() @ b.float().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        return grad @ b, grad.T @ a


def materialised(regions: Tensor, texts: Tensor, logit_scale: Tensor, threshold: float | None) -> Tensor:
    """The loss over stored fp32 logits, as lean as plain PyTorch lets it be.

    The scale is multiplied into the regions, as open_clip does, and the two directions share their logits: so nothing
    of R x R is stored but the logits and the filter. Captions are compared by a product in their own dtype.
    """
    regions, texts = F.normalize(regions.float(), dim=-1), F.normalize(texts.float(), dim=-1).to(texts.dtype)
    logits = _Product.apply((logit_scale * regions).to(texts.dtype), texts)
    if threshold is not None:
        with torch.no_grad():
            similar = (texts @ texts.T > threshold).fill_diagonal_(False)
        logits = logits.masked_fill_(similar, -torch.inf)
    return (logits.logsumexp(1) + logits.logsumexp(0)).mean() / 2 - logits.diagonal().mean()


def load_open_clip() -> Loss:
    """open_clip's ClipLoss on one GPU, with embeddings normalised as its models do it."""
    loss = library("open_clip").ClipLoss()

    def clip_loss(regions: Tensor, texts: Tensor, logit_scale: Tensor, threshold: float | None) -> Tensor:
        units = [F.normalize(x.float(), dim=-1).to(x.dtype) for x in (regions, texts)]
        return loss(*units, logit_scale)

    return clip_loss


PEERS = (
    Peer("eager", lambda: materialised),
    Peer("torch.compile", lambda: torch_compile(materialised, backward_alone=False)),
    Peer("open_clip", load_open_clip, filters=False),
)
