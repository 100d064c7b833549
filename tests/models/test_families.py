"""Every backbone of Locality Alignment, table 5: what the wrapper says and computes is what timm says and computes."""

import pytest
import torch
from model_families import FAMILIES, Family, enliven, images

from locfast.models.backbone import Backbone, load_backbone


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def backbone(family: Family) -> Backbone:
    return enliven(load_backbone(family.name, pretrained=False, image_size=family.image_size, depth=depth(family)))


def depth(family: Family) -> int:
    """Blocks enough to notice one that is skipped, where they are cheap."""
    return 2 if family.width <= 768 else 1


def test_shapes_are_the_published_ones(family: Family, backbone: Backbone) -> None:
    assert backbone.num_prefix_tokens == family.prefix
    assert backbone.grid == (family.side, family.side)
    assert backbone.num_patches == family.side**2
    assert (backbone.embed_dim, backbone.num_heads, backbone.depth) == (family.width, family.heads, depth(family))
    assert backbone.norm_eps == family.eps
    assert (backbone.mlp_kind, type(backbone.act_layer()).__name__) == (family.mlp, family.act)
    assert backbone.has_final_norm is family.final_norm
    assert backbone.qkv_bias
    assert backbone.supports_softcap


@torch.no_grad()
def test_features_are_those_of_timm(backbone: Backbone) -> None:
    x = images(backbone, count=1)
    expected = backbone.model.forward_features(x)
    features = backbone.forward_features(x)
    assert features.shape == (1, backbone.num_tokens, backbone.embed_dim)
    # The same modules in the same order; only the attention call differs, by its own rounding.
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_state_dict_keys_are_those_of_timm(backbone: Backbone) -> None:
    assert {key.removeprefix("model.") for key in backbone.state_dict()} == set(backbone.model.state_dict())
