"""MaskEmbed's arithmetic against the paper and the lines of its public reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from locfast.config.maskembed import MaskEmbedConfig
from locfast.errors import UserError
from locfast.methods import create_method
from locfast.methods.maskembed import Draw, MaskEmbed
from locfast.random import Keys

MODEL = "vit_tiny_patch16_224"
SIZE = 64  # a grid of 4 x 4


def make(model: str = MODEL, **fields) -> MaskEmbed:
    method = create_method("maskembed", MaskEmbedConfig(**fields), model=model, pretrained=False, image_size=SIZE)
    assert isinstance(method, MaskEmbed)
    return method


def keys(samples: int = 3, seed: int = 0) -> Keys:
    return Keys(seed, torch.zeros(samples, dtype=torch.int64), torch.arange(samples))


def images(samples: int = 3) -> torch.Tensor:
    return torch.randn(samples, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def batch(samples: int = 3) -> dict:
    return {"views": {"image": images(samples)}}


def shake(method: MaskEmbed) -> MaskEmbed:
    """Move the parameters that start at zero, so that every path carries signal."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in [*method.head.parameters(), *method.decoder.parameters()]:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return method


@pytest.fixture(scope="module")
def default() -> MaskEmbed:
    return make()


def test_loss_is_equation_one_written_out() -> None:
    method = shake(make(softcap=None))
    method.target_scale.fill_(0.7)
    draw, x = method.draw(keys()), images()
    loss = method({"views": {"image": x}}, draw)["loss"]

    prefix, size = method.teacher.num_prefix_tokens, method.teacher.patch_size[0]
    encoded = method.head(method.encoder.model.forward_features(x))
    total, count = 0.0, 0
    for image in range(len(x)):
        for view in range(3):
            seen = draw.visible[image, view]
            pixels = seen.view(1, 1, SIZE // size, SIZE // size).repeat_interleave(size, 2).repeat_interleave(size, 3)
            hidden_state = method.teacher.model.patch_embed(x[image : image + 1] * pixels)
            hidden_state = method.teacher.model._pos_embed(hidden_state)
            for block in method.teacher.model.blocks[:-1]:
                hidden_state = block(hidden_state)
            target = method.teacher.model.norm(hidden_state)[0] * 0.7
            embeddings = torch.cat([torch.zeros(prefix, encoded.shape[-1]), encoded[image, prefix:] * seen[:, None]])
            y = (embeddings + method.decoder.position)[None]
            for block in method.decoder.blocks:
                y = block(y)
            rebuilt = method.decoder.output(method.decoder.norm(y))[0]
            total, count = total + (rebuilt - target).square().sum(), count + target.numel()
    # fp32 sums over 10^5 terms in another order
    torch.testing.assert_close(loss, total / count, rtol=2e-5, atol=0)


def test_before_the_first_step_the_encoder_says_nothing(default: MaskEmbed) -> None:
    features = default.encoder.forward_features(images(), softcap=30.0)
    assert torch.equal(default.head(features), torch.zeros_like(features))


def test_student_starts_as_the_teacher_but_for_its_final_norm(default: MaskEmbed) -> None:
    teacher, student = default.teacher.state_dict(), default.encoder.state_dict()
    assert teacher.keys() == student.keys()
    assert all(torch.equal(student[k], teacher[k]) for k in teacher)  # a seeded norm starts at 1 and 0 as well
    assert all(p.requires_grad for p in default.encoder.model.norm.parameters())
    assert default.encoder.model.norm.eps == default.teacher.model.norm.eps


def test_reinitialised_last_block_differs_and_keep_norm_keeps_it() -> None:
    method = make(reinit_last_block=True, reinit_norm=False)
    teacher, student = method.teacher.state_dict(), method.encoder.state_dict()
    changed = {k for k in teacher if not torch.equal(teacher[k], student[k])}
    last = method.teacher.depth - 1
    assert changed and all(f"blocks.{last}." in k for k in changed)


def test_teacher_is_frozen_and_stays_in_eval_mode(default: MaskEmbed) -> None:
    default.train()
    assert not default.teacher.training and default.encoder.training
    assert not any(p.requires_grad for p in default.teacher.parameters())
    assert set(default.frozen_state()) == {k for k in default.state_dict() if k.startswith("teacher.")}
    assert "target_scale" in default.training_state()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target": "last"},
        {"target": "last_cls"},
        {"head": "mlp"},
        {"loss": "cosine"},
        {"loss": "l1"},
        {"loss_on": "hidden"},
        {"loss_on": "visible"},
        {"masking": "bernoulli", "all_visible": False},
        {"masking": "block", "complement": False},
        {"masking": "reversed_block"},
        {"mixup": 0.5},
        {"cutmix": 1.0},
        {"mixup": 0.5, "cutmix": 1.0},
        {"decoder": "average", "target": "last_cls", "masking": "block"},
        {"decoder": "additive", "target": "last_cls", "masking": "reversed_block"},
        {"softcap": None, "decoder_depth": 1},
        {"complement": False, "all_visible": False},
    ],
    ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "default",
)
def test_every_alternative_trains(fields: dict) -> None:
    method = shake(make(**fields))
    out = method(batch(4), method.draw(keys(4)))
    out["loss"].backward()
    trainable = {n: p for n, p in method.named_parameters() if p.requires_grad}
    silent = [n for n, p in trainable.items() if p.grad is None]
    assert torch.isfinite(out["loss"]) and not silent
    assert all(p.grad is None for p in method.teacher.parameters())
    assert sum(float(p.grad.abs().sum()) for n, p in trainable.items() if "encoder" in n) > 0


def test_cls_target_is_compared_image_by_image() -> None:
    """The public code's loss broadcast [B, 1, D] against [B, D] to [B, B, D]: every image pulled to every target."""
    method = shake(make(target="last_cls", complement=False, all_visible=False))
    draw = method.draw(keys())
    whole = method(batch(), draw)["loss"]
    alone = [method({"views": {"image": images()[i : i + 1]}}, Draw(draw.visible[i : i + 1]))["loss"] for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(alone).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_on", ["all", "hidden", "visible"])
def test_loss_of_a_batch_is_the_mean_of_its_halves(loss_on: str) -> None:
    method = shake(make(loss_on=loss_on))
    draw, x = method.draw(keys(4)), images(4)
    halves = [method({"views": {"image": x[i : i + 2]}}, Draw(draw.visible[i : i + 2]))["loss"] for i in (0, 2)]
    whole = method({"views": {"image": x}}, draw)["loss"]
    torch.testing.assert_close(whole, torch.stack(halves).mean(), rtol=1e-5, atol=0)


def test_average_and_additive_decoders_pool_the_visible_embeddings() -> None:
    method = make(decoder="average", target="last_cls", masking="block")
    embeddings = torch.randn(2, 16, method.teacher.embed_dim)
    visible = method.draw(keys(2)).visible
    mean = method.decoder(embeddings, visible)
    additive = make(decoder="additive", target="last_cls", masking="block").decoder(embeddings, visible)
    for image in range(2):
        for view in range(3):
            kept = embeddings[image, visible[image, view]]
            torch.testing.assert_close(mean[image, view, 0], kept.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(additive[image, view, 0], kept.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder": "average"},
        {"decoder": "additive", "target": "last_cls"},
        {"decoder": "average", "target": "penultimate", "masking": "block"},
        {"target": "last_cls", "loss_on": "hidden"},
        {"softcap": -1.0},
        {"softcap": float("inf")},
        {"bernoulli_p": 0.0},
        {"decoder_depth": 0},
    ],
)
def test_combinations_without_meaning_are_refused(fields: dict) -> None:
    with pytest.raises(UserError):
        MaskEmbedConfig(**fields)


def test_cls_target_needs_a_model_with_a_cls_token() -> None:
    with pytest.raises(UserError, match="no CLS token"):
        make("vit_base_patch16_siglip_224", target="last_cls")


def test_target_scale_is_one_over_the_targets_standard_deviation() -> None:
    method = make()
    parts = [({"views": {"image": images(4)[i : i + 2]}}, method.draw(keys(4))) for i in (0, 2)]
    parts = [(b, Draw(d.visible[i : i + 2])) for (b, d), i in zip(parts, (0, 2), strict=True)]
    method.prepare(parts, reduce_sum=lambda t: t)
    targets = torch.cat([method.target(b["views"]["image"], d.visible) for b, d in parts])
    expected = 1 / targets.double().std(correction=0)
    torch.testing.assert_close(method.target_scale.double(), expected, rtol=1e-6, atol=0)


def test_target_scale_can_be_left_off() -> None:
    method = make(target_scale=False)
    method.prepare([(batch(), method.draw(keys()))], reduce_sum=lambda t: t)
    assert method.target_scale == 1


def test_draws_are_the_samples_own(default: MaskEmbed) -> None:
    whole = default.draw(keys(5)).visible
    one = default.draw(Keys(0, torch.tensor([0]), torch.tensor([3]))).visible
    assert torch.equal(whole[3:4], one)


def test_decoder_blocks_always_have_a_norm_in_front() -> None:
    """The public code's decoders for BEiT inherit an identity instead."""
    method = make("beit_base_patch16_224", softcap=None)
    assert all(isinstance(b.norm1, torch.nn.LayerNorm) for b in method.decoder.blocks)
    assert isinstance(method.encoder.model.norm, torch.nn.LayerNorm)


def test_decoder_takes_the_backbones_activation() -> None:
    clip = make("vit_base_patch16_clip_quickgelu_224")
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(clip.decoder.blocks[0].mlp.act(x), x * torch.sigmoid(1.702 * x))
    eva = make("eva02_base_patch16_clip_224", softcap=None)
    gate = eva.decoder.blocks[0].mlp
    torch.testing.assert_close(gate.act(x), F.silu(x))
    assert gate.fc2.in_features == 4 * eva.teacher.embed_dim


def test_seed_fixes_the_initialisation_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = make(), make()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_grad_checkpointing_changes_no_gradient() -> None:
    plain, recomputed = shake(make()), shake(make())
    recomputed.enable_grad_checkpointing()
    for method in (plain, recomputed):
        method(batch(2), method.draw(keys(2)))["loss"].backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_defaults_follow_table_six() -> None:
    config = MaskEmbedConfig()
    optim = dataclasses.asdict(config.optim)
    assert (config.softcap, config.decoder_depth, config.decoder_layer_scale) == (30.0, 2, 1e-6)
    assert optim["betas"] == (0.9, 0.95) and optim["weight_decay"] == 0.01 and optim["clip"] == 1.0
    assert (
        optim["eps"] == 1e-8 and optim["final_lr_ratio"] == 0.1 and optim["warmup_epochs"] == 0 and optim["decay_all"]
    )
    assert make().defaults() == {"epochs": 5, "batch_size": 1024, "lr": 3e-4}


def test_an_fp8_teacher_makes_the_targets_and_their_scale_and_leaves_the_student_alone() -> None:
    plain, fp8 = make(), make(teacher_precision="fp8")
    assert fp8.state_dict().keys() == plain.state_dict().keys()
    assert {type(m) for m in fp8.encoder.modules()} == {type(m) for m in plain.encoder.modules()}
    draw = fp8.draw(keys())
    target, other = fp8.target(images(), draw.visible), plain.target(images(), draw.visible)
    # a branch is four products, each some 3.7 % off: 7.4 % in all where they do not add up; residuals are exact
    assert 0.01 * other.norm() < (target - other).norm() < 0.1 * other.norm()
    fp8.prepare([(batch(), draw)], lambda sums: sums)
    assert fp8.target_scale.item() == pytest.approx(1 / target.double().std(correction=0).item(), rel=1e-6)
