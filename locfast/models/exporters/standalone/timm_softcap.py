"""A soft cap for timm's Vision Transformers, in plain PyTorch. Written by locfast, which it does not need.

    model = set_softcap(timm.create_model(...), 30.0)

The weights beside this file were trained with attention logits bounded to cap * tanh(logits / cap). That is part of the
forward pass and not of the weights. locfast's own `set_softcap` does the same with a fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

try:
    from timm.layers import apply_rot_embed_cat
    from timm.models.eva import EvaAttention
except ImportError:  # an old timm without EVA-02: its ViTs alone
    apply_rot_embed_cat, EvaAttention = None, None  # type: ignore[assignment, misc]


def softcapped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
    """q, k, v [B, H, T, D] -> [B, H, T, D]. Logits in fp32: in bf16 those near a cap of 30 would lie 0.125 apart."""
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.float() @ k.float().transpose(-2, -1)) * scale
    return (softcap * torch.tanh(logits / softcap)).softmax(dim=-1).to(v.dtype) @ v


class SoftcapAttention(Attention):
    """timm's ViT attention under a soft cap. x [B, T, C] -> [B, T, C]."""

    softcap: float

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        return _project(self, softcapped_attention(q, k, v, self.scale, self.softcap))


CAPPED: dict[type[nn.Module], type[nn.Module]] = {Attention: SoftcapAttention}

if EvaAttention is not None:

    class SoftcapEvaAttention(EvaAttention):
        """EVA-02's attention, with RoPE, under a soft cap. x [B, T, C] -> [B, T, C]."""

        softcap: float

        def forward(self, x: Tensor, rope: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            if self.qkv is None:
                parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
            else:
                biases: Any = (self.q_bias, self.k_bias, self.v_bias)
                bias = self.qkv.bias if biases[0] is None else torch.cat(biases)
                parts = list(nn.functional.linear(x, self.qkv.weight, bias).chunk(3, dim=-1))
            q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
            q, k = (self.q_norm(q), self.k_norm(k)) if hasattr(self, "q_norm") else (q, k)
            if rope is not None:
                q, k = (self._turn(part, rope).type_as(v) for part in (q, k))
            return _project(self, softcapped_attention(q, k, v, self.scale, self.softcap))

        def _turn(self, heads: Tensor, rope: Tensor) -> Tensor:
            """RoPE turns all but the prefix tokens of [B, H, T, D]."""
            prefix = getattr(self, "num_prefix_tokens", 1)
            half = {"half": True} if getattr(self, "rotate_half", False) else {}
            return torch.cat([heads[:, :, :prefix], apply_rot_embed_cat(heads[:, :, prefix:], rope, **half)], dim=2)

    CAPPED[EvaAttention] = SoftcapEvaAttention


def _project(attn: Any, out: Tensor) -> Tensor:
    out = out.transpose(1, 2).flatten(2)
    out = attn.norm(out) if hasattr(attn, "norm") else out
    return attn.proj_drop(attn.proj(out))


def supports(model: Any) -> bool:
    """Whether `set_softcap` knows the attention of every block."""
    return all(type(block.attn) in CAPPED and getattr(block.attn, "gate", None) is None for block in model.blocks)


def set_softcap(model: Any, softcap: float | None) -> Any:
    """Bound the attention logits of every block of a timm ViT or EVA-02, in place; None: nothing to do.

    Every attention keeps its parameters and its state-dict keys. Raises ValueError for attention of another kind.
    """
    if softcap is None:
        return model
    if not supports(model):
        raise ValueError(
            f"no soft cap for a {type(model).__name__}: its attention is neither timm's ViT's nor EVA-02's"
        )
    for block in model.blocks:
        # The class changes and the module stays, so that hooks, wrappers and optimisers go on holding it.
        block.attn.__class__ = CAPPED[type(block.attn)]
        block.attn.softcap = softcap
    return model
