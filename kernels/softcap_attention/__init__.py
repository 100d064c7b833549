"""Attention whose logits are squashed into (-softcap, softcap) by a tanh before the softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backend
from . import cuda, ops, reference

OP = "softcap_attention"
LARGEST_CAP = 1e30
MAX_HEAD_DIM = 256
"""Wider heads exist in no ViT and would not fit the fused kernels' tiles."""


def softcap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(softcap * tanh((q k^T * scale + bias) / softcap)) v over the keys that key_mask keeps.

    q [B, H, Tq, D], k and v [B, H, Tk, D], of one dtype and with any strides (packed projections are read where they
    are)  ->  [B, H, Tq, D] in that dtype, laid out so that `.transpose(1, 2).flatten(2)` copies nothing.
    softcap: in units of the logits, > 0; None for plain attention. scale: default D^-0.5.
    key_mask [B, Tk] bool, True = kept: hidden keys have no weight, whatever they hold; a query with no key gets zeros.
    bias: broadcastable to [B, H, Tq, Tk], added before the cap; on `reference` and `tiled` only.

    Differentiable in q, k, v and bias; on the reference backend twice. Nothing of size T x T is stored but there. Under
    autocast q, k and v are cast as PyTorch's own attention casts them, which is also what `auto` takes without a cap.
    The cap is the public MaskEmbed code's (Locality Alignment, student encoder, cap 30).
    Raises ValueError for shapes and dtypes that do not fit, BackendError for a named backend that cannot run.
    """
    _check(q, k, v, softcap, key_mask, bias, backend)
    if _autocasts(q.device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    try:
        chosen = _backend.choose(OP, q.device, q.dtype, backend, "" if bias is None else "it takes no bias")
    except _backend.BackendError as error:
        raise _backend.BackendError(f"{error} {_found(q, k, v)}") from None
    if chosen == "reference":
        return reference.softcap_attention(q, k, v, softcap, scale, key_mask, bias)
    if bias is not None:
        bias = bias.reshape(*(1,) * (4 - bias.ndim), *bias.shape)
    if softcap is None and backend == "auto":
        return _pytorchs_attention(q, k, v, scale, key_mask, bias)
    backward_to_come = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    keeps_rest = chosen == "triton" and q.dtype != torch.float32 and backward_to_come
    return ops.forward_op(q, k, v, softcap, scale, key_mask, bias, keeps_rest, chosen)[0]


def _pytorchs_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    """F.scaled_dot_product_attention, and zeros where no key is kept."""
    if bias is not None:
        bias = bias.expand(*bias.shape[:3], k.shape[2]).to(q.dtype).contiguous()  # on a GPU it takes no other strides
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    alive = key_mask.any(-1)[:, None, None, None]
    hidden = ~key_mask[:, None, :, None]
    k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    mask = key_mask[:, None, None, :] | ~alive  # a row with no key left sees all of them, and is zeroed below
    if bias is not None:
        mask = torch.where(mask, bias, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).masked_fill(~alive, 0)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"softcap_attention: q [B, H, Tq, D] and k, v [B, H, Tk, D] must share B, H and D. {_found(q, k, v)}"
        )
    batch, heads, tokens, head_dim = q.shape
    if head_dim == 0:
        raise ValueError(f"softcap_attention: heads of width 0 have no scores. {_found(q, k, v)}")
    if head_dim > MAX_HEAD_DIM and backend != "reference":
        raise ValueError(
            f"softcap_attention: head dim {head_dim} is beyond {MAX_HEAD_DIM}. Use more heads, or backend='reference', "
            f"which takes any. {_found(q, k, v)}"
        )
    floating = all(t.is_floating_point() for t in (q, k, v))
    if not floating or not (q.dtype == k.dtype == v.dtype or _autocasts(q.device)):
        raise ValueError(
            "softcap_attention: q, k and v must share one floating dtype; cast them, as in q.to(torch.bfloat16). "
            f"{_found(q, k, v)}"
        )
    others = [t for t in (k, v, key_mask, bias) if t is not None]
    if any(t.device != q.device for t in others):
        devices = ", ".join(str(t.device) for t in (q, *others))
        raise ValueError(f"softcap_attention: all tensors must be on one device, got {devices}. {_found(q, k, v)}")
    if softcap is not None and not 1 / LARGEST_CAP <= softcap <= LARGEST_CAP:
        raise ValueError(
            "softcap_attention: softcap must be positive and finite, or None for plain attention "
            f"({1 / LARGEST_CAP:g} to {LARGEST_CAP:g}, so that fp32 holds it and its inverse), got {softcap}. "
            f"{_found(q, k, v)}"
        )
    keys = k.shape[2]
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, keys)):
        raise ValueError(
            f"softcap_attention: key_mask must be bool [B, Tk] = {[batch, keys]} (True = kept), "
            f"got {_kind(key_mask)}. {_found(q, k, v)}"
        )
    if bias is None:
        return
    full = (batch, heads, tokens, keys)
    fits = bias.ndim <= 4 and all(
        have in (1, want) for have, want in zip(reversed(bias.shape), reversed(full), strict=False)
    )
    if not fits or not bias.is_floating_point():
        raise ValueError(
            f"softcap_attention: bias must be floating and broadcastable to [B, H, Tq, Tk] = {list(full)}, "
            f"got {_kind(bias)}. {_found(q, k, v)}"
        )


def _autocasts(device: torch.device) -> bool:
    """Whether autocast is on; a meta device, where models are only sized, knows no autocast and would raise."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _found(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"Found q {_kind(q)}, k {_kind(k)}, v {_kind(v)}."


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


_backend.register(
    OP,
    {
        "triton": _backend.triton_probe,
        "tiled": _backend.anywhere,
        "reference": _backend.anywhere,
        # Behind the others: `auto` takes it once a committed measurement shows that it beats Triton.
        "cuda": cuda.probe,
    },
)

__all__ = ["softcap_attention"]
