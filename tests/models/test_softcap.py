"""The soft cap: in the wrapper, on a plain timm model, and against its formula."""

import copy
import pickle

import pytest
import torch
from model_families import images, small

from locfast.errors import UserError
from locfast.models.attention import attend
from locfast.models.softcap import set_softcap

KINDS = ("clip", "siglip", "dinov2_reg", "eva02", "beit", "rope_mixed")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_huge_cap_is_no_cap_and_a_small_one_is_felt(kind: str) -> None:
    backbone = small(kind)
    x = images(backbone)
    plain = backbone(x)
    torch.testing.assert_close(backbone(x, softcap=1e4), plain, rtol=1e-4, atol=1e-4)
    assert ((backbone(x, softcap=0.5) - plain).norm() / plain.norm()).item() > 1e-4


@torch.no_grad()
def test_capped_attention_is_its_formula_written_out() -> None:
    attn = small("clip").model.blocks[0].attn.double()
    x = torch.randn(2, 17, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).view(2, 17, 3, 4, 16).permute(2, 0, 3, 1, 4)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / 4.0
    assert logits.abs().max() > 5.0
    weights = (5.0 * torch.tanh(logits / 5.0)).softmax(-1)
    mixed = torch.einsum("bhij,bhjd->bihd", weights, v).reshape(2, 17, 64)
    torch.testing.assert_close(attend(attn, x, 5.0), mixed @ attn.proj.weight.T + attn.proj.bias)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_capped_timm_model_computes_what_the_wrapper_computes_with_the_same_keys(kind: str) -> None:
    backbone = small(kind)
    x = images(backbone)
    model = copy.deepcopy(backbone.model)
    assert set_softcap(model, 2.0) is model
    torch.testing.assert_close(model.forward_features(x), backbone(x, softcap=2.0))
    assert not torch.allclose(model.forward_features(x), backbone(x))
    assert model.state_dict().keys() == backbone.model.state_dict().keys()
    torch.testing.assert_close(set_softcap(model, None).forward_features(x), backbone(x))


@torch.no_grad()
def test_a_capped_model_survives_copies_and_pickles() -> None:
    backbone = small("clip")
    x = images(backbone)
    model = set_softcap(backbone.model, 2.0)
    expected = model.forward_features(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in other.blocks.parameters():
            parameter.zero_()  # a copy that still ran the original's attention would not notice
        assert not torch.allclose(other.forward_features(x), expected)
    assert torch.equal(model.forward_features(x), expected)


def test_a_model_without_known_attention_is_refused() -> None:
    with pytest.raises(UserError, match="does not know"):
        set_softcap(torch.nn.Linear(2, 2), 30.0)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_must_be_positive_and_finite(cap: float) -> None:
    with pytest.raises(UserError, match="positive and finite"):
        set_softcap(small("clip").model, cap)


def test_attention_dropout_is_refused_while_training() -> None:
    model = small("clip").model
    model.blocks[0].attn.attn_drop.p = 0.1
    with pytest.raises(UserError, match="attn_drop_rate=0"):
        attend(model.blocks[0].attn.train(), torch.zeros(1, 3, 64))
