"""Soft-capped attention in plain PyTorch: the truth that every faster backend is tested against."""

import torch
from torch import Tensor


def softcap_attention(
    q: Tensor, k: Tensor, v: Tensor, softcap: float | None, scale: float, bias: Tensor | None = None
) -> Tensor:
    """softmax(softcap * tanh(q k^T * scale / softcap) + bias) v, for q, k, v [B, H, T, D], in q's dtype.

    Computes in fp32, or in fp64 for fp64 inputs; stores T x T scores; differentiable twice.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        logits = q.to(compute) @ k.to(compute).transpose(-2, -1) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias.to(compute)
        return (torch.softmax(logits, dim=-1) @ v.to(compute)).to(q.dtype)
