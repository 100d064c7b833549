"""Soft-capped attention in blocks of query rows: plain PyTorch, never more than one block of scores in memory.

The backward recomputes each block from q, k and the row-wise log-sum-exp, as FlashAttention does (Dao et al. 2022,
algorithm 4), with the soft cap's derivative 1 - tanh^2. Nothing is accumulated out of order: deterministic.
"""

import torch
from torch import Tensor

MAX_BLOCK_SCORES = 1 << 25
"""Scores in memory at a time: 128 MiB in fp32. Short sequences (the demo's 65 tokens) are one block."""


def softcap_attention(
    q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, T, D], bias broadcastable over [B, H, T, T]  ->  output [B, H, T, D], log-sum-exp [B, H, T].

    Inputs in bf16 and fp16 are computed in fp32; the output is in q's dtype, the log-sum-exp in fp32 (fp64).
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    compute = _compute_dtype(q)
    log_sum_exp = torch.empty(q.shape[:-1], dtype=compute, device=q.device)
    keys, values = k.to(compute).transpose(-2, -1), v.to(compute)
    for rows in _blocks(q):
        tanh = ((q[:, :, rows].to(compute) * (scale / softcap)) @ keys).tanh_()
        logits = _add_bias(tanh.mul_(softcap), bias, rows)
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out[:, :, rows] = (weights @ values).div_(total).to(q.dtype)
        log_sum_exp[:, :, rows] = (top + total.log_()).squeeze(-1)
    return out, log_sum_exp


def softcap_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
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
        tanh = ((queries * (scale / softcap)) @ keys.transpose(-2, -1)).tanh_()
        weights = _add_bias(tanh * softcap, bias, rows).sub_(log_sum_exp[:, :, rows, None]).exp_()
        v_grad += weights.transpose(-2, -1) @ out_grad
        delta = (out_grad * out[:, :, rows].to(compute)).sum(-1, keepdim=True)
        logits_grad = (out_grad @ values.transpose(-2, -1)).sub_(delta).mul_(weights)
        if bias_grad is not None:
            part = bias_grad if bias_grad.shape[-2] == 1 else bias_grad[:, :, rows]
            part += logits_grad.sum_to_size(part.shape)
        scores_grad = logits_grad.mul_(tanh.square_().neg_().add_(1.0)).mul_(scale)
        q_grad[:, :, rows] = (scores_grad @ keys).to(q.dtype)
        k_grad += scores_grad.transpose(-2, -1) @ queries
    if bias_grad is not None and bias is not None:
        bias_grad = bias_grad.to(bias.dtype)
    return q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype), bias_grad


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _blocks(q: Tensor) -> list[slice]:
    """Even blocks of query rows that keep within MAX_BLOCK_SCORES (but no fewer than 16 rows)."""
    batch, heads, tokens, _ = q.shape
    most = max(16, MAX_BLOCK_SCORES // max(1, batch * heads * tokens))
    count = max(1, -(-tokens // most))
    size = -(-tokens // count)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _add_bias(logits: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
    if bias is None:
        return logits
    return logits.add_(bias if bias.shape[-2] == 1 else bias[:, :, rows])
