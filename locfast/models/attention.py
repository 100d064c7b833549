"""timm's attention modules, run with a soft cap, on a subset of tokens, or just as timm runs them.

The weights stay timm's modules; only the product of softmax and values is ours: the op with a cap,
`uncapped_attention` without.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.kernels.softcap_attention import softcap_attention
from locfast.models.fp8 import Fp8Linear
from locfast.models.uncapped_attention import Implementation, uncapped_attention

ATTENTIONS: tuple[type[nn.Module], ...] = (
    vision_transformer.Attention,
    eva.EvaAttention,
    AttentionRope,
    beit.Attention,
)
"""Attention modules whose arithmetic `attend` knows."""


def timm_class(attn: nn.Module) -> type[nn.Module] | None:
    """The timm class whose arithmetic `attn` has, with a cap or without; None where `attend` does not know it.

    Subclasses may differ, so only the very classes count, and those that `set_softcap` puts in their places.
    """
    kind = getattr(attn, "uncapped_class", type(attn))
    return kind if kind in ATTENTIONS else None


def attend(
    attn: Any,
    x: Tensor,
    softcap: float | None = None,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    uncapped: Implementation = "sdpa",
) -> Tensor:
    """Self-attention with the weights of timm's module `attn`.

    x [B, T, C] -> [B, T, C]. `softcap` bounds the logits to +-softcap by tanh; None: by the cap that `set_softcap` gave
    the module, if it did. `rope` [N, 2D] (one table), or [B, 1 or H, N, 2D] (one a sample), turns queries and keys of
    all tokens but the prefix. `bias` [1 or B, H, T, T] is added to the logits, before the cap. `key_mask` [B, T] bool:
    which tokens are seen. `uncapped`: what computes attention that has no cap.
    """
    return attend_products(attn, products(attn, x), x, softcap, rope, bias, key_mask, uncapped)


def attend_products(
    attn: Any,
    products: tuple[Tensor, ...],
    gate_input: Tensor,
    softcap: float | None = None,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    uncapped: Implementation = "sdpa",
) -> Tensor:
    """`attend` from behind the product for queries, keys and values on. gate_input: the normed tokens, for a gate."""
    softcap = getattr(attn, "softcap", None) if softcap is None else softcap
    q, k, v = queries_keys_values(attn, products, rope)
    if attn.training and attn.attn_drop.p:
        raise UserError(
            f"the model was created with attention dropout {attn.attn_drop.p}, which locfast's attention lacks. "
            "Create it with attn_drop_rate=0."
        )
    if softcap is None and key_mask is None:
        out = uncapped_attention(q, k, v, attn.scale, bias, uncapped)
    else:
        out = softcap_attention(q, k, v, softcap=softcap, scale=attn.scale, key_mask=key_mask, bias=bias)
    out = out.transpose(1, 2).flatten(2)
    out = attn.norm(out) if hasattr(attn, "norm") else out
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(gate_input).sigmoid()
    return attn.proj_drop(attn.proj(out))


def queries_keys_values(
    attn: Any, products: tuple[Tensor, ...], rope: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `products` gave for [B, T, C] as queries, keys and values of each head, [B, H, T, D], normed and turned."""
    q, k, v = _heads(attn, products)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = _rotate(attn, q, rope).type_as(v), _rotate(attn, k, rope).type_as(v)
    return q, k, v


def relative_position_bias(attn: Any, shared: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """BEiT's bias on the logits: a block's own table plus the model's shared one, at the `kept` tokens.

    shared [1, H, T, T] or None, kept [B, K] token indices or None -> [1, H, T, T], [B, H, K, K] or None.
    """
    own = attn._get_rel_pos_bias() if attn.relative_position_bias_table is not None else None
    bias = own if shared is None else shared if own is None else own + shared
    if bias is None or kept is None:
        return bias
    return bias[0][:, kept[:, :, None], kept[:, None, :]].transpose(0, 1)


def rotary_table(model: Any, kept: Tensor | None) -> Tensor | None:
    """RoPE's sines and cosines, for all patches or the `kept` ones: what `attend` takes, or a stack of one a block.

    kept [B, K] patch indices or None -> [N, 2D], [B, 1, K, 2D]; where every block has its own table
    [L, H, N, 2D], [L, B, H, K, 2D]; None where the model has no RoPE.
    """
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    grid = model.patch_embed.grid_size
    table = rope.get_embed() if getattr(rope, "feat_shape", None) is not None else rope.get_embed(shape=grid)
    if kept is None:
        return table
    if table.ndim == 2:
        return table[kept][:, None]
    return table[:, :, kept].transpose(1, 2)


def products(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of tokens x [..., C], side by side in one tensor or, by three modules, in three."""
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    if getattr(attn, "q_bias", None) is None:
        return (attn.qkv(x),)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return (attn.qkv.multiply(x, bias) if isinstance(attn.qkv, Fp8Linear) else F.linear(x, attn.qkv.weight, bias),)


def _heads(attn: Any, products: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What `products` gave for [B, T, C], as queries, keys and values, each [B, H, T, D]."""
    if len(products) == 1:
        q, k, v = products[0].unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    q = products[0].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    k, v = (product.unflatten(-1, (-1, q.shape[-1])).transpose(1, 2) for product in products[1:])
    groups = q.shape[1] // k.shape[1]
    return (q, k, v) if groups == 1 else (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def _rotate(attn: Any, heads: Tensor, rope: Tensor) -> Tensor:
    """Turn all but the prefix tokens of `heads` [B, H, T, D]."""
    prefix = getattr(attn, "num_prefix_tokens", 1)
    half = {"half": True} if getattr(attn, "rotate_half", False) else {}
    return torch.cat([heads[:, :, :prefix], apply_rot_embed_cat(heads[:, :, prefix:], rope, **half)], dim=2)
