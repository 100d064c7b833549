"""Soft-capped attention in blocks of query rows: plain PyTorch, never more than a few blocks of scores in memory.

The backward computes each block of probabilities anew from q and k: nothing of size T x T is kept between the two.
Rows are whole, so the softmax is PyTorch's own, and every sum has one order: deterministic.
"""

import torch
from torch import Tensor

MAX_BLOCK_SCORES = 1 << 25
"""Scores in memory at a time: 128 MiB in fp32. Short sequences (the demo's 65 tokens) are one block."""


def softcap_attention(q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float, bias: Tensor | None) -> Tensor:
    """q, k, v [B, H, T, D], bias broadcastable over [B, H, T, T]  ->  [B, H, T, D] in q's dtype.

    Inputs in bf16 and fp16 are computed in fp32, which costs tensor cores on a GPU: there it is the fallback.
    """
    compute = _compute_dtype(q)
    keys, values = k.to(compute), v.to(compute)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for rows in _blocks(q):
        tanh = _capped(q[:, :, rows].to(compute), keys, softcap, scale)
        out[:, :, rows] = _softmax(tanh.mul_(softcap), bias, rows) @ values
    return out


def softcap_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float,
    scale: float,
    bias: Tensor | None,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v [B, H, T, D] and of bias (its own shape, or None where it is not needed)."""
    compute = _compute_dtype(q)
    keys, values = k.to(compute), v.to(compute)
    q_grad = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_grad, v_grad = torch.zeros_like(keys), torch.zeros_like(values)
    bias_grad = None
    if bias is not None and needs_bias_grad:
        bias_grad = torch.zeros(bias.shape, dtype=compute, device=bias.device)
    for rows in _blocks(q):
        queries, out_grad = q[:, :, rows].to(compute), grad[:, :, rows].to(compute)
        tanh = _capped(queries, keys, softcap, scale)
        weights = _softmax(tanh * softcap, bias, rows)
        v_grad += weights.transpose(-2, -1) @ out_grad
        # Softmax's derivative from the weights themselves: a shortcut through the rounded output loses digits in bf16.
        logits_grad = (out_grad @ values.transpose(-2, -1)).mul_(weights)
        logits_grad.addcmul_(weights, logits_grad.sum(-1, keepdim=True), value=-1)
        if bias_grad is not None:
            part = bias_grad if bias_grad.shape[-2] == 1 else bias_grad[:, :, rows]
            part += logits_grad.sum_to_size(part.shape)
        scores_grad = logits_grad.mul_(tanh.square_().neg_().add_(1.0)).mul_(scale)
        q_grad[:, :, rows] = scores_grad @ keys
        k_grad += scores_grad.transpose(-2, -1) @ queries
    if bias_grad is not None and bias is not None:
        bias_grad = bias_grad.to(bias.dtype)
    return q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype), bias_grad


def _capped(queries: Tensor, keys: Tensor, softcap: float, scale: float) -> Tensor:
    """tanh(q k^T * scale / softcap) for a block of rows: [B, H, rows, T]."""
    return (queries @ keys.transpose(-2, -1)).mul_(scale / softcap).tanh_()


def _softmax(logits: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
    if bias is not None:
        logits.add_(bias if bias.shape[-2] == 1 else bias[:, :, rows])
    return torch.softmax(logits, dim=-1)


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _blocks(q: Tensor) -> list[slice]:
    """Even blocks of query rows that keep within MAX_BLOCK_SCORES (but no fewer than 16 rows)."""
    batch, heads, tokens, _ = q.shape
    most = max(16, MAX_BLOCK_SCORES // max(1, batch * heads * tokens))
    count = max(1, -(-tokens // most))
    size = max(1, -(-tokens // count))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
