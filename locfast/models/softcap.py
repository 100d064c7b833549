"""The soft cap on a timm model: MaskEmbed's student has it, and a user of an exported backbone puts it back."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from timm.layers import AttentionRope
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.kernels.softcap_attention import LARGEST_CAP
from locfast.models.attention import attend, relative_position_bias, timm_class

Model = TypeVar("Model", bound=nn.Module)


def set_softcap(model: Model, softcap: float | None) -> Model:
    """Bound the attention logits of every block to +-softcap, by softcap * tanh(logits / softcap); None: bound no more.

    model: a timm VisionTransformer, Eva or Beit, or a Backbone, changed in place and returned:
    `model = set_softcap(timm.create_model(...), 30.0)`. Every block's attention becomes a module of one of the classes
    below, with the very parameters, buffers, hooks and state-dict keys that it had; None gives it timm's class back.
    BEiT's relative position bias belongs to the logits and is capped with them. Attention pooling behind the blocks is
    not capped (as in the public MaskEmbed code). Raises UserError, and changes nothing, for a cap that is not positive
    and finite and for attention that locfast does not know.
    """
    if softcap is not None and not 1 / LARGEST_CAP <= softcap <= LARGEST_CAP:
        raise UserError(
            f"a soft cap of {softcap} was asked for; it bounds |logits|, so it must be positive and finite (at most "
            f"{LARGEST_CAP:g}). Type None for plain attention."
        )
    attentions: list[Any] = [getattr(block, "attn", block) for block in getattr(model, "blocks", ())]
    if softcap is None:
        for attn in attentions:
            if timm_class(attn) in _CAPPED:
                attn.__class__ = timm_class(attn)
                attn.__dict__.pop("softcap", None)
        return model
    unknown = [type(attn).__name__ for attn in attentions if timm_class(attn) is None]
    if unknown or not attentions:
        kind = f" {unknown[0]}" if unknown else ""
        inside = " Give it the model inside: model.module." if hasattr(model, "module") else ""
        raise UserError(
            f"a soft cap was asked for on a {type(model).__name__}, whose attention{kind} locfast does not know."
            f"{inside} It knows that of timm's VisionTransformer, Eva and Beit. Load an export through timm first; "
            "train another model without a cap (--maskembed.softcap None)."
        )
    for attn in attentions:
        # The class changes and the object stays, as in FSDP2: optimisers, hooks and the block go on holding it.
        attn.__class__ = _CAPPED[timm_class(attn)]
        attn.softcap = softcap
    return model


class _Softcapped(nn.Module):
    """What the capped attentions share. The cap is no buffer: state dicts stay timm's."""

    uncapped_class: ClassVar[type[nn.Module]]
    softcap: float

    def extra_repr(self) -> str:
        return f"softcap={self.softcap:g}"


class SoftcapAttention(_Softcapped, vision_transformer.Attention):
    """timm's ViT attention under a soft cap. x [B, T, C] -> [B, T, C]."""

    uncapped_class = vision_transformer.Attention

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return attend(self, x, key_mask=_key_mask(x, attn_mask, is_causal))


class SoftcapEvaAttention(_Softcapped, eva.EvaAttention):
    """EVA-02's attention, with RoPE, under a soft cap. x [B, T, C] -> [B, T, C]."""

    uncapped_class = eva.EvaAttention

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return attend(self, x, rope=rope, key_mask=_key_mask(x, attn_mask, is_causal))


class SoftcapAttentionRope(_Softcapped, AttentionRope):
    """The attention of timm's other ViTs with RoPE under a soft cap. x [B, T, C] -> [B, T, C]."""

    uncapped_class = AttentionRope

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return attend(self, x, rope=rope, key_mask=_key_mask(x, attn_mask, is_causal))


class SoftcapBeitAttention(_Softcapped, beit.Attention):
    """BEiT's attention, its bias inside the cap. x [B, T, C] -> [B, T, C]."""

    uncapped_class = beit.Attention

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return attend(self, x, bias=relative_position_bias(self, shared_rel_pos_bias, None))


_CAPPED: dict[Any, type[_Softcapped]] = {
    kind.uncapped_class: kind
    for kind in (SoftcapAttention, SoftcapEvaAttention, SoftcapAttentionRope, SoftcapBeitAttention)
}


def _key_mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """timm's mask of hidden tokens, bool [B, 1, 1, T] with True = kept, as the op's [B, T]. x [B, T, C]."""
    if attn_mask is None and not is_causal:
        return None
    batch, tokens, _ = x.shape
    if is_causal or attn_mask is None:
        found = "is_causal"
    elif attn_mask.dtype != torch.bool or attn_mask.shape != (batch, 1, 1, tokens):
        found = f"{attn_mask.dtype} {list(attn_mask.shape)}"
    else:
        return attn_mask[:, 0, 0]
    raise UserError(
        f"soft-capped attention was given the attention mask {found}. It hides whole tokens only: give a bool mask "
        f"[B, 1, 1, T] = {[batch, 1, 1, tokens]}, True where a token is kept, or none."
    )
