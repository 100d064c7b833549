"""MAE's decoder puts every token back at its place, and knows places by fixed sines and cosines."""

from __future__ import annotations

import math

import pytest
import torch

from locfast.errors import UserError
from locfast.models.backbone import load_backbone
from locfast.models.pixel_decoder import PixelDecoder
from locfast.models.scratch import fix_positions, sincos_positions, start_from_scratch


@pytest.fixture(scope="module")
def decoder() -> PixelDecoder:
    torch.manual_seed(0)
    return PixelDecoder(load_backbone("vit_tiny_patch16_224", False, image_size=64), width=32, depth=2, heads=4)


def test_the_order_of_visible_tokens_does_not_matter_and_their_places_do(decoder: PixelDecoder) -> None:
    tokens = torch.randn(2, 1 + 5, 192)
    kept = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    order = torch.randperm(5)
    pixels, decoded = decoder(tokens, kept)
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], 1)
    again, _ = decoder(shuffled, kept[:, order])
    assert torch.equal(again, pixels) and pixels.shape == (2, 16, 768) and decoded.shape == (2, 16, 32)
    elsewhere, _ = decoder(shuffled, kept)
    assert (elsewhere - pixels).abs().max() > 1e-3


def test_without_blocks_a_place_shows_its_own_token_or_the_mask(decoder: PixelDecoder) -> None:
    plain = PixelDecoder(load_backbone("vit_tiny_patch16_224", False, image_size=64), width=32, depth=0, heads=4)
    tokens, kept = torch.randn(1, 3, 192), torch.tensor([[11, 2]])
    _, decoded = plain(tokens, kept)
    position = sincos_positions((4, 4), 32)
    for place in range(16):
        here = {11: plain.embed(tokens[0, 1]), 2: plain.embed(tokens[0, 2])}.get(place, plain.mask_token[0, 0])
        torch.testing.assert_close(decoded[0, place], plain.norm(here + position[place]), rtol=1e-5, atol=1e-6)


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    position = sincos_positions((3, 5), 16)
    assert position.shape == (15, 16)
    for row in range(3):
        for column in range(5):
            angles = [[place * 10000 ** (-i / 4) for i in range(4)] for place in (column, row)]
            wanted = [f(a) for some in angles for f in (math.sin, math.cos) for a in some]
            assert position[5 * row + column].tolist() == pytest.approx(wanted, abs=1e-7)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions((2, 2), 18)


def test_a_scratch_backbone_is_drawn_anew_as_mae_draws_it() -> None:
    backbone = load_backbone("vit_tiny_patch16_224", False, image_size=64)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    torch.manual_seed(1)
    fix_positions(start_from_scratch(backbone))
    weight = backbone.model.blocks[3].mlp.fc1.weight  # Xavier: uniform within sqrt(6 / (192 + 768))
    assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / 960), rel=1e-3)
    patch = backbone.model.patch_embed.proj.weight  # as a layer from 768 to 192
    assert patch.abs().max().item() == pytest.approx(math.sqrt(6 / 960), rel=1e-3)
    assert not torch.equal(before["model.cls_token"], backbone.model.cls_token)
    assert not any(block.attn.qkv.bias.any() for block in backbone.blocks)


def test_fixed_positions_need_absolute_ones() -> None:
    with pytest.raises(UserError, match="no absolute position embeddings"):
        fix_positions(load_backbone("beit_base_patch16_224", False, image_size=64, depth=1))
