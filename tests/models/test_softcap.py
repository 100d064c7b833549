"""The soft cap: against its formula, in the wrapper, and as modules in the places of a timm model's attention."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import images, small
from torch import nn

from locfast.errors import UserError
from locfast.models.attention import attend, timm_class
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.softcap import set_softcap

KINDS = ("clip", "siglip", "dinov2_reg", "eva02", "beit", "rope_mixed")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attentions(model: Any) -> list[nn.Module]:
    return [block.attn for block in model.blocks]


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
    attn: Any = small("clip").blocks[0].attn.double()
    x = noise(2, 17, 64) * 3
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).view(2, 17, 3, 4, 16).permute(2, 0, 3, 1, 4)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / 4.0
    assert logits.abs().max() > 5.0
    weights = (5.0 * torch.tanh(logits / 5.0)).softmax(-1)
    mixed = torch.einsum("bhij,bhjd->bihd", weights, v).reshape(2, 17, 64)
    torch.testing.assert_close(attend(attn, x, 5.0), mixed @ attn.proj.weight.T + attn.proj.bias)


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_beits_bias_is_part_of_the_logits_that_are_capped(shared: bool) -> None:
    model = small("beit").model.double()
    attn = model.blocks[0].attn
    x, between = noise(2, 17, 64) * 3, noise(1, 4, 17, 17) if shared else None
    qkv = x @ attn.qkv.weight.T + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    q, k, v = qkv.view(2, 17, 3, 4, 16).permute(2, 0, 3, 1, 4)
    bias = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / 4.0 + bias + (0 if between is None else between)
    weights = (2.0 * torch.tanh(logits / 2.0)).softmax(-1)
    mixed = torch.einsum("bhij,bhjd->bihd", weights, v).reshape(2, 17, 64)
    set_softcap(model, 2.0)
    torch.testing.assert_close(attn(x, shared_rel_pos_bias=between), mixed @ attn.proj.weight.T + attn.proj.bias)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_capped_timm_model_computes_what_the_wrapper_computes_and_none_takes_the_cap_off(kind: str) -> None:
    backbone = small(kind)
    x = images(backbone)
    model = copy.deepcopy(backbone.model)
    uncapped = model.forward_features(x)
    assert set_softcap(model, 2.0) is model
    torch.testing.assert_close(model.forward_features(x), backbone(x, softcap=2.0))
    assert not torch.allclose(model.forward_features(x), uncapped)
    assert torch.equal(set_softcap(model, None).forward_features(x), uncapped)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_class_of_the_attention_changes_and_none_gives_timms_back(kind: str) -> None:
    model = small(kind).model
    before = attentions(model)
    classes = [type(attn) for attn in before]
    attributes = [set(vars(attn)) for attn in before]
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    tensors = [(name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())]
    set_softcap(model, 2.0)
    assert all(now is then for now, then in zip(attentions(model), before, strict=True))
    assert all(issubclass(type(a), c) and type(a) is not c for a, c in zip(attentions(model), classes, strict=True))
    assert [timm_class(attn) for attn in attentions(model)] == classes
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert [(n, id(t)) for n, t in (*model.named_parameters(), *model.named_buffers())] == tensors
    assert "softcap=2" in str(model)
    set_softcap(model, None)
    assert [type(attn) for attn in attentions(model)] == classes
    assert [set(vars(attn)) for attn in attentions(model)] == attributes
    assert "softcap" not in str(model)


@torch.no_grad()
def test_another_cap_replaces_the_former_and_the_same_again_changes_nothing() -> None:
    model = small("eva02").model
    x = images(small("eva02"))
    once = set_softcap(copy.deepcopy(model), 1.0).forward_features(x)
    again = set_softcap(set_softcap(set_softcap(model, 5.0), 1.0), 1.0)
    assert torch.equal(again.forward_features(x), once)
    plain = set_softcap(set_softcap(again, None), None)
    assert all(type(attn) is timm_class(attn) for attn in attentions(plain))


@torch.no_grad()
def test_a_backbone_takes_the_cap_too_and_a_call_may_ask_for_another() -> None:
    backbone = small("clip")
    x = images(backbone)
    expected = {cap: backbone(x, softcap=cap) for cap in (None, 1.0, 2.0)}
    assert set_softcap(backbone, 2.0) is backbone
    assert backbone.softcap == 2.0
    assert torch.equal(backbone(x), expected[2.0])
    assert torch.equal(backbone(x, softcap=1.0), expected[1.0])
    assert torch.equal(Backbone(backbone.model, "again")(x), expected[2.0])
    assert set_softcap(backbone, None).softcap is None
    assert torch.equal(backbone(x), expected[None])


@pytest.mark.parametrize("kind", ["clip", "eva02", "beit"])
@torch.no_grad()
def test_a_capped_model_survives_copies_pickles_and_files(kind: str, tmp_path: Path) -> None:
    backbone = small(kind)
    x = images(backbone)
    model = set_softcap(backbone.model, 2.0)
    expected = model.forward_features(x)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other.forward_features(x), expected)
        for parameter in other.blocks.parameters():
            parameter.zero_()  # a copy that still ran the original's attention would not notice
        assert not torch.allclose(other.forward_features(x), expected)
    assert torch.equal(model.forward_features(x), expected)


@torch.no_grad()
def test_weights_pass_between_capped_and_plain_models() -> None:
    plain, other = small("beit").model, set_softcap(small("beit", seed=1).model, 2.0)
    x = images(small("beit"))
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other.forward_features(x), set_softcap(copy.deepcopy(plain), 2.0).forward_features(x))
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    plain.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True), strict=True)


@pytest.mark.parametrize(("kind", "caps"), [("clip", (2.0, 0.5, None)), ("eva02", (2.0,)), ("beit", (2.0,))])
def test_a_capped_model_compiles_whole_and_a_new_cap_is_not_the_old_graph(
    kind: str, caps: tuple[float | None, ...]
) -> None:
    backbone = small(kind, depth=1)
    model, x = set_softcap(backbone.model.train(), 2.0), images(backbone)
    compiled = torch.compile(model.forward_features, backend="aot_eager", fullgraph=True)
    for cap in caps:
        set_softcap(model, cap)
        model.zero_grad()
        expected = model.forward_features(x)
        expected.square().mean().backward()
        gradients = [p.grad.clone() for p in model.blocks.parameters() if p.grad is not None]
        model.zero_grad()
        found = compiled(x)
        found.square().mean().backward()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert gradients
        for p, gradient in zip((p for p in model.blocks.parameters() if p.grad is not None), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


def test_timms_own_checkpointing_changes_no_gradient_of_a_capped_model() -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = small("eva02")
        model = set_softcap(backbone.model, 2.0).train()
        model.set_grad_checkpointing(checkpointing)
        model.forward_features(images(backbone)).square().sum().backward()
        gradients.append([p.grad for p in model.blocks.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_hooks_and_modes_stay() -> None:
    model = small("clip").model
    heard: list[str] = []
    model.blocks[0].attn.register_forward_hook(lambda *_: heard.append("once"))
    model.blocks[0].attn.proj_drop.p = 1.0
    x, attn = torch.randn(1, 17, 64), set_softcap(model, 2.0).blocks[0].attn
    assert attn.eval()(x).abs().sum() > 0
    assert attn.train()(x).abs().sum() == 0  # dropout of everything
    assert heard == ["once", "once"]


@pytest.mark.parametrize("kind", ["clip", "eva02", "rope_mixed"])
@torch.no_grad()
def test_tokens_hidden_by_timms_key_mask_are_as_if_they_were_not_there(kind: str) -> None:
    backbone = set_softcap(small(kind), 2.0)
    x = backbone.add_prefix_and_position(backbone.embed_patches(images(backbone)))
    kept = torch.tensor([[0, 2, 3, 9], [1, 5, 8, 15]])
    tokens = torch.cat([torch.zeros(2, 1, dtype=torch.int64), kept + 1], 1)
    few = backbone.run_blocks(x.gather(1, tokens[..., None].expand(-1, -1, 64)), stop=1, kept=kept)
    mask = torch.zeros(2, 1, 1, 17, dtype=torch.bool).scatter(3, tokens[:, None, None], True)
    rope: dict[str, Any] = {}
    if backbone.family == "eva":
        table = backbone.model.rope.get_embed()
        rope = {"rope": table[0] if table.ndim == 4 else table}
    x[~mask[:, 0, 0]] = torch.nan
    all_tokens = backbone.blocks[0](x, attn_mask=mask, **rope)
    torch.testing.assert_close(all_tokens.gather(1, tokens[..., None].expand(-1, -1, 64)), few, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "eva02"])
@pytest.mark.parametrize(
    "given",
    [
        {"attn_mask": torch.ones(2, 1, 17, 17, dtype=torch.bool)},
        {"attn_mask": torch.ones(1, 1, 1, 17, dtype=torch.bool)},
        {"attn_mask": torch.ones(2, 17, dtype=torch.bool)},
        {"attn_mask": torch.zeros(2, 1, 1, 17)},
        {"is_causal": True},
        {"attn_mask": torch.ones(2, 1, 1, 17, dtype=torch.bool), "is_causal": True},
    ],
    ids=["pairs", "one for all", "bare", "additive", "causal", "both"],
)
def test_other_masks_are_refused(kind: str, given: dict[str, Any]) -> None:
    attn = set_softcap(small(kind), 2.0).blocks[0].attn
    with pytest.raises(UserError, match=r"hides whole tokens only: give a bool mask \[B, 1, 1, T\] = \[2, 1, 1, 17\]"):
        attn(torch.zeros(2, 17, 64), **given)


@torch.no_grad()
def test_blocks_that_only_timm_can_run_have_their_attention_capped() -> None:
    """A post-norm EVA: its attention is known, its block is not."""
    backbone = load_backbone("eva02_enormous_patch14_clip_224", pretrained=False, depth=2, embed_dim=64, num_heads=4)
    backbone.double()
    x, model = images(backbone.eval()).double(), copy.deepcopy(backbone.model)
    attn: Any
    for attn in attentions(backbone):
        attn.qkv.weight *= 20  # logits that a cap of 1 bends
    model.load_state_dict(backbone.model.state_dict())
    plain = backbone(x)
    capped = set_softcap(backbone, 1.0)(x)
    assert not torch.allclose(capped, plain)
    torch.testing.assert_close(capped, set_softcap(model, 1.0).forward_features(x), rtol=1e-12, atol=1e-12)


def test_attention_that_is_not_known_is_refused_and_left_alone() -> None:
    model = small("clip").model

    class Own(type(model.blocks[1].attn)):  # type: ignore[misc]
        pass

    model.blocks[1].attn.__class__ = Own
    with pytest.raises(UserError, match="attention Own locfast does not know"):
        set_softcap(model, 30.0)
    assert all(not hasattr(attn, "softcap") for attn in attentions(model))
    assert set_softcap(model, None) is model
    with pytest.raises(UserError, match="does not know"):
        set_softcap(nn.Linear(2, 2), 30.0)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_must_be_positive_and_finite(cap: float) -> None:
    with pytest.raises(UserError, match="positive and finite"):
        set_softcap(small("clip").model, cap)


def test_attention_dropout_is_refused_while_training() -> None:
    model = small("clip").model
    model.blocks[0].attn.attn_drop.p = 0.1
    with pytest.raises(UserError, match="attn_drop_rate=0"):
        attend(model.blocks[0].attn.train(), torch.zeros(1, 3, 64))
