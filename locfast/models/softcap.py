"""The soft cap on a plain timm model: what a user of an exported backbone needs of locfast, in one line."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, TypeVar

from timm.models import beit
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.models.attention import ATTENTIONS, attend, relative_position_bias

Model = TypeVar("Model", bound=nn.Module)


def apply_softcap(timm_model: Model, softcap: float | None) -> Model:
    """Bound the attention logits of every block of a timm ViT, EVA or BEiT to +-softcap; None takes the bound off.

    Changes the model in place and returns it: `model = apply_softcap(timm.create_model(...), 30.0)`. Weights and
    state-dict keys stay as they are. Attention pooling behind the blocks is not capped (as in the public MaskEmbed
    code). Raises UserError for a cap that is not positive and finite and for models without such blocks.
    """
    if softcap is not None and not 0 < softcap < math.inf:
        raise UserError(
            f"a soft cap of {softcap} was asked for; it bounds |logits|, so it must be positive and finite. Type None "
            "for plain attention."
        )
    attentions: list[Any] = [getattr(block, "attn", None) for block in getattr(timm_model, "blocks", ())]
    if not attentions or any(type(attn) not in ATTENTIONS for attn in attentions):
        raise UserError(
            f"a soft cap was asked for on a {type(timm_model).__name__}, whose attention locfast does not know. It "
            "knows the attention of timm's VisionTransformer, Eva and Beit. Load the exported model through timm first."
        )
    for attn in attentions:
        attn.softcap = softcap
        if softcap is None:
            attn.__dict__.pop("forward", None)
        else:
            attn.forward = partial(_capped_forward, attn)
    return timm_model


def _capped_forward(
    attn: Any,
    x: Tensor,
    rope: Tensor | None = None,
    shared_rel_pos_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Takes whatever timm's blocks hand to their attention. x [B, T, C] -> [B, T, C]."""
    if attn_mask is not None or is_causal:
        raise UserError(
            "soft-capped attention was called with an attention mask, which it does not have. Leave it out."
        )
    bias = relative_position_bias(attn, shared_rel_pos_bias, None) if isinstance(attn, beit.Attention) else None
    return attend(attn, x, attn.softcap, rope, bias)
