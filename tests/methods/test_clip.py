"""Contrastive fine-tuning: CLIP's loss, the same gradients from micro-batches, and rates that fall with depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locfast.config.clip import ClipConfig
from locfast.data.spec import Record
from locfast.errors import UserError
from locfast.methods.clip import Clip
from locfast.methods.layer_decay import layer
from locfast.random import Keys
from tests.methods.pairs import tiny_clip

pytest.importorskip("open_clip")

WORDS = ("red", "green", "blue", "white", "black", "grey", "brown", "pink")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def make(text: str, model: str = "open_clip", **fields: Any) -> Clip:
    return Clip(ClipConfig(text=text, text_pretrained="none", **fields), model=model, pretrained=False)


def batch_of(rows: range, side: int = 32, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    images = torch.randn(8, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(0))
    records = [Record(b"", text=f"a {WORDS[row]} thing") for row in rows]
    return {"views": {"image": images[list(rows)]}, "records": records}


def gradients(method: Clip, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


DRAW = torch.zeros(8)


def test_the_loss_is_the_mean_of_both_cross_entropies_of_cosines_over_the_temperature(text):
    method = make(text, temperature=0.05).double()
    batch = batch_of(range(8))
    images, texts = method.embed(batch, method.tokens(batch, DRAW))
    logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T / 0.05
    truth = torch.arange(8)
    expected = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    told = method(batch, DRAW)
    torch.testing.assert_close(told["loss"], expected, rtol=1e-7, atol=0)  # the scale is kept in fp32
    assert set(told) == {"loss"}
    theirs, ours = gradients(method, expected), gradients(method, told["loss"])
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7 * theirs[name].abs().max().item())


@pytest.mark.parametrize(
    "fields",
    [{}, {"learn_temperature": True, "temperature": 0.07}, {"freeze_text": True}, {"drop_path": 0.5}],
    ids=["fixed", "learned", "frozen text", "drop path"],
)
def test_four_micro_batches_have_the_gradient_of_one_large_batch(text, fields):
    method = make(text, **fields).double()
    parts = [batch_of(range(start, start + 2)) for start in range(0, 8, 2)]
    draws = [DRAW[:2]] * 4

    def seeded(number: int) -> None:
        torch.manual_seed(100 + number)

    embedded = []
    for number, (part, draw) in enumerate(zip(parts, draws, strict=True)):
        seeded(number)
        embedded.append(method.embed(part, method.tokens(part, draw)))
    images, texts = (torch.cat(side) for side in zip(*embedded, strict=True))
    whole = method.contrast(images, texts)
    expected = gradients(method, whole)

    torch.manual_seed(7)  # other blocks are dropped: the seeds above matter where any are
    again = torch.cat(
        [method.embed(part, method.tokens(part, draw))[0] for part, draw in zip(parts, draws, strict=True)]
    )
    assert bool((again != images).any()) == ("drop_path" in fields)

    looks = []
    with torch.no_grad():
        for number, (part, draw) in enumerate(zip(parts, draws, strict=True)):
            seeded(number)
            looks.append(method.look(part, draw))
    found = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    for number, (part, draw, ahead) in enumerate(zip(parts, draws, method.weigh(looks), strict=True)):
        seeded(number)
        loss = method({**part, "ahead": ahead}, draw)["loss"]
        assert loss.item() == whole.item()
        for name, gradient in gradients(method, loss / 4).items():
            found[name] += gradient
    assert expected["log_scale" if "temperature" in fields else "image.backbone.model.head.weight"].abs().max() > 0
    for name, gradient in expected.items():  # fp64, up to the order of sums
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11 * gradient.abs().max().item() + 1e-15)


def test_without_the_other_micro_batches_the_gradient_is_another(text):
    method = make(text).double()
    whole = gradients(method, method(batch_of(range(8)), DRAW)["loss"])
    halves = [gradients(method, method(batch_of(range(s, s + 4)), DRAW[:4])["loss"] / 2) for s in (0, 4)]
    name = "image.backbone.model.head.weight"
    assert (halves[0][name] + halves[1][name] - whole[name]).norm() > 0.1 * whole[name].norm()


def test_a_learned_scale_stays_at_or_below_a_hundred_and_can_leave_it_again(text):
    method = make(text, learn_temperature=True)
    with torch.no_grad():
        method.log_scale.fill_(6.0)
    told = method(batch_of(range(8), dtype=torch.float32), DRAW)
    assert told["temperature"].item() == pytest.approx(0.01)
    assert gradients(method, told["loss"])["log_scale"].abs() > 0
    assert method.scale().item() == pytest.approx(100)


def test_one_of_several_captions_is_drawn_by_the_key_of_its_sample(text):
    method = make(text)
    batch = batch_of(range(8))
    batch["records"] = [Record(b"", texts=("a red thing", " ", "a blue thing"))] * 8
    keys = Keys(3, torch.zeros(8, dtype=torch.int64), torch.arange(8))
    draw = method.draw(keys)
    red, blue = method.text.tokenize(["a red thing", "a blue thing"])
    told = method.tokens(batch, draw)
    assert [bool((row == blue).all()) for row in told] == (draw >= 0.5).tolist()
    assert all(bool((row == red).all()) or bool((row == blue).all()) for row in told)
    assert 0 < (draw >= 0.5).sum() < 8
    assert torch.equal(method.draw(Keys(3, keys.epoch[2:4], keys.index[2:4])), draw[2:4])


def rates(method: Clip) -> dict[str, tuple[float, float]]:
    """(lr_scale, weight_decay) by parameter name."""
    names = {id(p): name for name, p in method.named_parameters()}
    groups = method.parameter_groups()
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    return found


def test_learning_rates_fall_with_depth_in_both_towers(text):
    method = make(text, learn_temperature=True, temperature=0.07, text_lr_scale=0.1)
    found = rates(method)
    assert set(found) == {name for name, p in method.named_parameters() if p.requires_grad}
    image, tower = "image.backbone.model.", "text.model."
    expected = {
        f"{image}cls_token": 0.75**3,
        f"{image}pos_embed": 0.75**3,
        f"{image}patch_embed.proj.weight": 0.75**3,
        f"{image}norm_pre.weight": 0.75**3,
        f"{image}blocks.0.attn.qkv.weight": 0.75**2,
        f"{image}blocks.1.mlp.fc1.bias": 0.75,
        f"{image}norm.weight": 1.0,
        f"{image}head.weight": 1.0,
        f"{tower}token_embedding.weight": 0.1 * 0.75**2,
        f"{tower}positional_embedding": 0.1 * 0.75**2,
        f"{tower}transformer.resblocks.0.mlp.c_fc.weight": 0.1 * 0.75,
        f"{tower}ln_final.weight": 0.1,
        f"{tower}text_projection": 0.1,
        "log_scale": 1.0,
    }
    assert {name: found[name][0] for name in expected} == pytest.approx(expected)


def test_matrices_alone_decay(text):
    method = make(text, learn_temperature=True)
    by_name = dict(method.named_parameters())
    for name, (_, decay) in rates(method).items():
        assert decay == (0.05 if by_name[name].ndim > 1 else 0.0), name


def test_large_towers_decay_more_slowly_and_learn_faster(text):
    large = make(text, model="vit_base_patch16_224")
    large.image.backbone.embed_dim = 1024
    assert rates(large)["image.backbone.model.blocks.11.norm1.weight"][0] == 0.85
    assert large.defaults() == {"epochs": 2, "batch_size": 49152, "lr": 4e-4}
    assert make(text).defaults()["lr"] == 2e-4
    assert rates(make(text, layer_decay=0.5))["image.backbone.model.blocks.0.norm1.weight"][0] == 0.25


def test_a_frozen_text_tower_gets_no_gradient_and_is_saved_once(text):
    method = make(text, freeze_text=True)
    assert not any(name.startswith("text.") for name in rates(method))
    assert any(name.startswith("text.") for name in method.frozen_state())
    assert not any(name.startswith("text.") for name in method.training_state())
    assert "log_scale" in method.training_state()


def test_artifacts_hold_both_towers_and_the_scale(text):
    method = make(text, temperature=0.02).eval()
    made = method.artifacts()
    batch = batch_of(range(8), dtype=torch.float32)
    tokens = method.tokens(batch, DRAW)
    images, texts = method.embed(batch, tokens)
    assert torch.equal(made["embed"](made["backbone"](batch["views"]["image"])), images)
    whole = method.text.tokenizer([record.text for record in batch["records"]])  # as others call the tower
    torch.testing.assert_close(made["text_tower"].encode_text(whole), texts)
    assert made["text_tower"].logit_scale.exp().item() == pytest.approx(50)
    assert made["text"] == {"model": text, "pretrained": "none"}


def test_recomputed_activations_give_the_same_gradients(text):
    method, batch = make(text), batch_of(range(8), dtype=torch.float32)
    plain = gradients(method, method(batch, DRAW)["loss"])
    method.enable_grad_checkpointing()
    assert all(torch.equal(g, plain[n]) for n, g in gradients(method, method(batch, DRAW)["loss"]).items())


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 0.001},
        {"layer_decay": 0.0},
        {"drop_path": 1.0},
        {"crop_scale": (0.0, 1.0)},
        {"text_lr_scale": 0.0},
        {"projection": "old"},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        ClipConfig(**fields)


def test_a_batch_of_one_pair_is_refused(text):
    with pytest.raises(UserError, match="--batch-size 1"):
        make(text).notes(1, 1, 1)
    assert make(text).notes(1, 2, 1) == make(text).notes(1, 1, 2) == []


def test_embeddings_of_t5_stand_before_its_blocks():
    assert layer("model.text.transformer.shared.weight", 8) == 0
    assert layer("model.text.transformer.encoder.block.3.layer.1.DenseReluDense.wo.weight", 8) == 4
