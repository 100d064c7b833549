"""Soft-capped attention in plain PyTorch: the truth that every faster backend is tested against."""

import torch
from torch import Tensor


def softcap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    scale: float,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(softcap * tanh((q k^T * scale + bias) / softcap)) v over the keys that key_mask keeps, in q's dtype.

    q [B, H, Tq, D], k, v [B, H, Tk, D], key_mask [B, Tk], bias broadcastable to [B, H, Tq, Tk]  ->  [B, H, Tq, D].
    Computes in fp32, or in fp64 for fp64 inputs; stores T x T scores; differentiable twice.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        query, key, value = q.to(compute), k.to(compute), v.to(compute)
        if key_mask is not None:  # selected away: a NaN in a hidden token must not leak through 0 * NaN
            hidden = ~key_mask[:, None, :, None]
            key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
        logits = query @ key.transpose(-2, -1) * scale
        if bias is not None:
            logits = logits + bias.to(compute)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if key_mask is None:
            return (torch.softmax(logits, dim=-1) @ value).to(q.dtype)
        hidden = ~key_mask[:, None, None, :]
        # A row with no key left gets a softmax over all of them, to stay finite, and then no weight at all.
        logits = logits.masked_fill(hidden & key_mask.any(-1)[:, None, None, None], -torch.inf)
        weights = torch.softmax(logits, dim=-1).masked_fill(hidden, 0)
        return (weights @ value).to(q.dtype)
