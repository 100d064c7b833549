"""How far what an encoder says of a masked view is from what a momentum encoder says of a whole one (LUT, table 4d)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from locfast.models.ranks import gather_rows


def distance(prediction: Tensor, target: Tensor, kind: str, temperature: float, everywhere: bool) -> Tensor:
    """The mean distance of prediction from target, both [R, C], in fp32 at least; a scalar.

    cosine: |p - t|^2 of vectors of length one, i.e. 2 - 2 cos. smooth_l1: over the vectors as they are, beta 1, the
    mean over the width. info_nce: minus the log-probability of the own target among all, by cosine over temperature;
    everywhere: among those of all ranks, not of this one alone. The target's gradient is nobody's: see `torch.no_grad`.
    """
    if torch.float64 not in (prediction.dtype, target.dtype):
        prediction, target = prediction.float(), target.float()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(prediction, target)
    p, t = F.normalize(prediction, dim=-1), F.normalize(target, dim=-1)
    if kind == "cosine":
        return (p - t).square().sum(-1).mean()
    others, first = gather_rows(t) if everywhere else (t, 0)
    own = torch.arange(first, first + len(p), device=p.device)
    return F.cross_entropy(p @ others.T / temperature, own)


def spread(features: Tensor) -> Tensor:
    """How different the rows of features [R, C] are: 0 where all point one way (collapse), 1 where their directions
    are uniform. The root of the summed variances of rows of length one."""
    directions = F.normalize(features.detach().float(), dim=-1)
    return directions.var(0, correction=0).sum().sqrt()
