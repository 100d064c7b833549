"""The region-contrastive losses written out over all pairs: the truth that the other backends are held to."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .filter import exceeds


def region_contrastive_loss(
    regions: Tensor, texts: Tensor, logit_scale: Tensor, threshold: float | None, valid: Tensor, dtype: torch.dtype
) -> Tensor:
    """Both directions' mean cross-entropy over valid rows, as the public function. dtype: that texts are rounded to."""
    regions, texts = unit_rows(regions[valid]), unit_rows(texts[valid])
    logits = logit_scale[valid][:, None] * (regions @ texts.T)
    logits = logits.masked_fill(similar(texts, threshold, dtype), -torch.inf)
    both = logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()
    return both.sum() / (2 * max(1, len(both)))


def region_sigmoid_loss(
    regions: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    threshold: float | None,
    valid: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Minus the log-likelihood of every counted pair being one or none, summed over texts, its mean over regions."""
    regions, texts = unit_rows(regions[valid]), unit_rows(texts[valid])
    logits = logit_scale[valid][:, None] * (regions @ texts.T) + logit_bias[valid][:, None]
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    losses = -F.logsigmoid(torch.where(own, logits, -logits))
    return losses.masked_fill(similar(texts, threshold, dtype), 0).sum() / max(1, len(logits))


def similar(units: Tensor, threshold: float | None, dtype: torch.dtype) -> Tensor:
    """units [R, E]  ->  [R, R]: True for a pair of two captions that are nearly the same text."""
    if threshold is None:
        return torch.zeros(len(units), len(units), dtype=torch.bool, device=units.device)
    rounded = units.detach().to(dtype).to(units.dtype)
    return exceeds(rounded, rounded, threshold).fill_diagonal_(False)


def unit_rows(x: Tensor) -> Tensor:
    """x [R, E] divided by its norms, at least 1e-12, in fp32 (fp64 for fp64 inputs)."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
