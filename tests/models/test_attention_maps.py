"""Attention maps: applied to values they are the block's own attention, and watching changes nothing."""

import math
from typing import Any

import pytest
import torch
from model_families import images, small

from locfast.errors import UserError
from locfast.models import attention_maps
from locfast.models.attention import attend, products, queries_keys_values
from locfast.models.attention_maps import attention_map, layer_by_layer
from locfast.models.backbone import load_backbone

KINDS = ("clip", "siglip", "dinov2_reg", "eva02", "beit", "rope_mixed")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_map_applied_to_values_is_the_blocks_own_attention(kind: str, softcap: float | None) -> None:
    backbone = small(kind)
    seen = 0
    for layer in layer_by_layer(backbone, images(backbone, 3), softcap):
        attn: Any = layer.placed.block.attn
        x = layer.placed.block.norm1(layer.input)
        weights = torch.cat(list(layer.attention()))
        assert weights.shape == (3, backbone.num_heads, backbone.num_tokens, backbone.num_tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        values = queries_keys_values(attn, products(attn, x), layer.placed.rope)[2]
        mixed = (weights @ values).transpose(1, 2).flatten(2)
        mixed = attn.norm(mixed) if hasattr(attn, "norm") else mixed
        mixed = mixed * attn.gate(x).sigmoid() if getattr(attn, "gate", None) is not None else mixed
        torch.testing.assert_close(attn.proj(mixed), attend(attn, x, softcap, layer.placed.rope, layer.placed.bias))
        if softcap is None:  # and timm's own module, called by itself
            place = {"rope": layer.placed.rope} if layer.placed.rope is not None else {}
            place |= {"shared_rel_pos_bias": None} if kind == "beit" else {}
            torch.testing.assert_close(attn.proj(mixed), attn(x, **place))
        assert (weights.amax(-1) > 1.2 * weights.amin(-1)).all()  # even rows would hide a mistake in the logits
        seen += 1
    assert seen == backbone.depth


@pytest.mark.parametrize("kind", ["clip", "beit"])
@torch.no_grad()
def test_cap_and_bias_are_in_the_map(kind: str) -> None:
    backbone = small(kind)
    block, rope, bias = next(iter(backbone.placed_blocks(None, 0, 1)))
    x = torch.randn(2, backbone.num_tokens, backbone.embed_dim, generator=torch.Generator().manual_seed(2)) * 3
    plain, capped = (attention_map(block.attn, x, cap, rope, bias) for cap in (None, 1.0))
    widest = [(one.amax(-1) / one.amin(-1)).max().item() for one in (plain, capped)]
    assert widest[1] <= math.exp(2.0) * 1.001 < widest[0]  # capped logits lie within -1 .. 1
    if bias is not None:
        assert not torch.allclose(plain, attention_map(block.attn, x, None, rope, None), atol=1e-3)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_watched_backbone_computes_the_same_bits(kind: str, softcap: float | None) -> None:
    backbone = small(kind)
    x = images(backbone)
    for layer in layer_by_layer(backbone, x, softcap):
        list(layer.attention())
    assert torch.equal(backbone.final_norm(layer.output), backbone.forward_features(x, softcap))


@torch.no_grad()
def test_images_taken_one_at_a_time_give_the_same_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small("clip")
    layer = next(layer_by_layer(backbone, images(backbone, 3)))
    whole = list(layer.attention())
    monkeypatch.setattr(attention_maps, "LARGEST", 1)
    single = list(layer.attention())
    assert (len(whole), len(single)) == (1, 3)
    torch.testing.assert_close(torch.cat(single), whole[0])


def test_blocks_that_only_timm_can_run_are_told() -> None:
    post_norm = load_backbone("eva02_base_patch16_clip_224", False, depth=1, use_post_norm=True)
    with pytest.raises(UserError, match="EvaBlockPostNorm, EvaAttention"):
        next(layer_by_layer(post_norm, images(post_norm)))
