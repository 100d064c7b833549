"""Soft-capped attention in blocks of query rows: plain PyTorch, never more than a few blocks of scores in memory.

The backward computes each block of probabilities anew from q and k: nothing of size T x T is kept between the two.
Rows are whole, so the softmax is PyTorch's own, and every sum has one order: deterministic.
"""

import torch
from torch import Tensor

from .layout import heads_inside_tokens

MAX_BLOCK_SCORES = 1 << 22
"""Scores in memory at a time: 16 MiB in fp32, a few of them within a processor's last cache."""


def softcap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    scale: float,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """q [B, H, Tq, D], k, v [B, H, Tk, D], key_mask [B, Tk], bias as in the reference  ->  [B, H, Tq, D] in q's dtype.

    Inputs in bf16 and fp16 are computed in fp32, which costs tensor cores on a GPU: there it is the fallback.
    """
    compute = _compute_dtype(q)
    keys, values = _select(k.to(compute), key_mask), _select(v.to(compute), key_mask)
    out = heads_inside_tokens(q)
    for rows in _blocks(q, k):
        logits = _logits(q[:, :, rows].to(compute), keys, scale, bias, rows)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        out[:, :, rows] = _softmax(logits, key_mask) @ values
    return out


def softcap_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    scale: float,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    needs_bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v in their shapes and dtypes, and of bias (its own shape, or None where it is not needed)."""
    compute = _compute_dtype(q)
    keys, values = _select(k.to(compute), key_mask), _select(v.to(compute), key_mask)
    q_grad = heads_inside_tokens(q)
    k_grad, v_grad = heads_inside_tokens(k, compute).zero_(), heads_inside_tokens(v, compute).zero_()
    bias_grad = None
    if bias is not None and needs_bias_grad:
        bias_grad = torch.zeros(bias.shape, dtype=compute, device=bias.device)
    for rows in _blocks(q, k):
        queries, out_grad = q[:, :, rows].to(compute), grad[:, :, rows].to(compute)
        logits = _logits(queries, keys, scale, bias, rows)
        tanh = None if softcap is None else logits.div_(softcap).tanh_()
        weights = _softmax(logits if softcap is None or tanh is None else tanh * softcap, key_mask)
        v_grad += weights.transpose(-2, -1) @ out_grad
        # Softmax's derivative from the weights themselves: a shortcut through the rounded output loses digits in bf16.
        logits_grad = (out_grad @ values.transpose(-2, -1)).mul_(weights)
        logits_grad.addcmul_(weights, logits_grad.sum(-1, keepdim=True), value=-1)
        if tanh is not None:
            logits_grad.mul_(tanh.square_().neg_().add_(1.0))
        if bias_grad is not None:
            part = bias_grad if bias_grad.shape[-2] == 1 else bias_grad[:, :, rows]
            part += logits_grad.sum_to_size(part.shape)
        logits_grad.mul_(scale)
        q_grad[:, :, rows] = logits_grad @ keys
        k_grad += logits_grad.transpose(-2, -1) @ queries
    if bias_grad is not None and bias is not None:
        bias_grad = bias_grad.to(bias.dtype)
    return q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype), bias_grad


def _logits(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None, rows: slice) -> Tensor:
    """q k^T * scale + bias for a block of rows: [B, H, rows, Tk]."""
    logits = (queries @ keys.transpose(-2, -1)).mul_(scale)
    if bias is not None:
        logits += bias if bias.shape[-2] == 1 else bias[:, :, rows]
    return logits


def _softmax(logits: Tensor, key_mask: Tensor | None) -> Tensor:
    """As in the reference: no weight for hidden keys, and none at all in a row with no key left."""
    if key_mask is None:
        return torch.softmax(logits, dim=-1)
    hidden = ~key_mask[:, None, None, :]
    logits.masked_fill_(hidden & key_mask.any(-1)[:, None, None, None], -torch.inf)
    return torch.softmax(logits, dim=-1).masked_fill_(hidden, 0)


def _select(tokens: Tensor, key_mask: Tensor | None) -> Tensor:
    """Zero hidden tokens of [B, H, Tk, D] by selection: a NaN in one must not leak through 0 * NaN."""
    return tokens if key_mask is None else tokens.masked_fill(~key_mask[:, None, :, None], 0)


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    """Even blocks of query rows that keep within MAX_BLOCK_SCORES (but no fewer than 16 rows)."""
    batch, heads, tokens, _ = q.shape
    most = max(16, MAX_BLOCK_SCORES // max(1, batch * heads * k.shape[2]))
    count = max(1, -(-tokens // most))
    size = max(1, -(-tokens // count))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
