"""Each choice of MaskEmbed's config by its values: targets, views, cap, decoder, losses, optimiser groups, images."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from locfast.config.base import OptimConfig
from locfast.config.maskembed import MaskEmbedConfig
from locfast.methods import create_method, masks
from locfast.methods.maskembed import MaskEmbed
from locfast.models.softcap import set_softcap
from locfast.random import Keys

SMALL = {"img_size": 64, "embed_dim": 64, "num_heads": 4, "depth": 2}
ARCHITECTURES = {
    "vit": "vit_base_patch16_224",
    "clip": "vit_base_patch16_clip_quickgelu_224",
    "siglip": "vit_base_patch16_siglip_224",
    "dinov2_reg": "vit_base_patch14_reg4_dinov2",
    "eva02": "eva02_base_patch16_clip_224",
    "beit": "beit_base_patch16_224",
}


def make(folder: Path, kind: str = "vit", args: dict | None = None, **fields) -> MaskEmbed:
    """MaskEmbed around a small model of a kind, given as a folder with timm's config alone."""
    config = {"architecture": ARCHITECTURES[kind], "pretrained_cfg": {}, "model_args": {**SMALL, **(args or {})}}
    if kind == "dinov2_reg":
        config["model_args"]["img_size"] = 56
    (folder / "config.json").write_text(json.dumps(config))
    method = create_method("maskembed", MaskEmbedConfig(**fields), model=str(folder), pretrained=False)
    assert isinstance(method, MaskEmbed)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # parameters that start at zero would hide the paths behind them
        for parameter in [*method.head.parameters(), *method.decoder.parameters()]:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for block in [*method.teacher.model.blocks, *method.encoder.model.blocks]:
            for name, parameter in block.named_parameters():
                if "qkv" in name or "q_proj" in name or "k_proj" in name:
                    parameter *= 10  # logits that a cap of 1 bends
    return method


def keys(samples: int = 2) -> Keys:
    return Keys(0, torch.zeros(samples, dtype=torch.int64), torch.arange(samples))


def batch(method: MaskEmbed, samples: int = 2) -> dict:
    size = method.teacher.image_size
    return {"views": {"image": torch.randn(samples, 3, *size, generator=torch.Generator().manual_seed(1))}}


@pytest.mark.parametrize("target", ["penultimate", "last", "last_cls"])
@torch.no_grad()
def test_target_is_the_named_output_of_the_model_on_masked_pixels(target: str, tmp_path: Path) -> None:
    method = make(tmp_path, target=target)
    images, visible = batch(method)["views"]["image"], method.draw(keys()).visible
    pixels = visible.view(6, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    model = copy.deepcopy(method.teacher.model)
    if target == "penultimate":
        model.blocks = model.blocks[:-1]
    expected = model.forward_features(images.repeat_interleave(3, 0) * pixels).unflatten(0, (2, 3))
    expected = expected[:, :, :1] if target == "last_cls" else expected
    torch.testing.assert_close(method.target(images, visible), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masking", ["uniform", "bernoulli", "block", "reversed_block"])
@pytest.mark.parametrize(("complement", "all_visible"), [(True, True), (True, False), (False, True), (False, False)])
def test_views_are_those_that_were_asked_for(masking: str, complement: bool, all_visible: bool, tmp_path: Path) -> None:
    method = make(tmp_path, masking=masking, bernoulli_p=0.2, complement=complement, all_visible=all_visible)
    views = list(method.draw(keys(40)).visible.unbind(1))
    first = views.pop(0)
    expected = {
        "uniform": masks.uniform_count(keys(40), 16),
        "bernoulli": masks.bernoulli(keys(40), 16, 0.2),
        "block": masks.blocks(keys(40), (4, 4), 0.4),
        "reversed_block": ~masks.blocks(keys(40), (4, 4), 0.4),
    }
    assert torch.equal(first, expected[masking])
    if complement:
        assert torch.equal(views.pop(0), ~first)
    if all_visible:
        assert views.pop(0).all()
    assert not views


@pytest.mark.parametrize("masking", ["block", "reversed_block"])
def test_block_masks_leave_no_view_empty(masking: str, tmp_path: Path) -> None:
    """The public code's do, where the unmasked view is added."""
    assert make(tmp_path, masking=masking).draw(keys(500)).visible.any(-1).all()


@torch.no_grad()
def test_the_cap_is_in_the_encoder_alone(tmp_path: Path) -> None:
    method = make(tmp_path, softcap=1.0)
    draw, images = method.draw(keys()), batch(method)["views"]["image"]
    capped = set_softcap(copy.deepcopy(method.encoder.model), 1.0)
    embeddings = method.head(capped.forward_features(images))[:, 1:]
    masked = torch.where(draw.visible[..., None], embeddings[:, None], 0)
    rebuilt = (F.pad(masked, (0, 0, 1, 0)) + method.decoder.position).flatten(0, 1)
    for block in method.decoder.blocks:
        rebuilt = block(rebuilt)
    rebuilt = method.decoder.output(method.decoder.norm(rebuilt)).unflatten(0, (2, 3))
    expected = F.mse_loss(rebuilt, method.target(images, draw.visible))
    loss = method(batch(method), draw)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    uncapped = make(tmp_path, softcap=None)
    assert torch.equal(uncapped.target(images, draw.visible), method.target(images, draw.visible))
    assert abs(uncapped(batch(method), draw)["loss"] - loss) > 1e-5


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_new_head_says_nothing(head: str, tmp_path: Path) -> None:
    make(tmp_path)  # writes the config
    method = create_method("maskembed", MaskEmbedConfig(head=head), model=str(tmp_path), pretrained=False)
    assert torch.equal(method.head(torch.randn(3, 64)), torch.zeros(3, 64))
    assert len(list(method.head.modules())) == (1 if head == "linear" else 4)


def test_a_new_decoder_is_as_the_paper_describes_it(tmp_path: Path) -> None:
    make(tmp_path)  # writes the config
    decoder = create_method("maskembed", MaskEmbedConfig(), model=str(tmp_path), pretrained=False).decoder
    assert decoder.position.shape == (17, 64)
    # 1088 draws: five standard errors of a standard deviation of 0.02
    assert abs(decoder.position.std().item() - 0.02) < 5 * 0.02 / math.sqrt(2 * 1088)
    assert len(decoder.blocks) == 2
    for block in decoder.blocks:
        assert block.attn.num_heads == 4
        assert block.mlp.fc1.out_features == 4 * 64
        assert (block.ls1.gamma == 1e-6).all() and (block.ls2.gamma == 1e-6).all()
    assert decoder.output.weight.shape == (64, 64)


@pytest.mark.parametrize("loss_on", ["all", "hidden", "visible"])
@pytest.mark.parametrize("loss", ["mse", "l1", "cosine"])
@torch.no_grad()
def test_loss_is_the_formula_over_the_tokens_that_were_asked_for(loss: str, loss_on: str, tmp_path: Path) -> None:
    method = make(tmp_path, loss=loss, loss_on=loss_on)
    method.target_scale.fill_(0.5)
    images, draw = batch(method), method.draw(keys())
    found = method(images, draw)
    a = method.decoder(method.head(method.encoder(images["views"]["image"]))[:, 1:], draw.visible, False)
    b = 0.5 * method.target(images["views"]["image"], draw.visible)
    per_token = {
        "mse": ((a - b) ** 2).mean(-1),
        "l1": (a - b).abs().mean(-1),
        "cosine": 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)),
    }[loss]
    means = []
    for image in range(2):
        patches, shown = per_token[image, :, 1:], draw.visible[image]
        chosen = {"all": per_token[image].flatten(), "hidden": patches[~shown], "visible": patches[shown]}
        means.append(chosen[loss_on].mean())
    torch.testing.assert_close(found["loss"], torch.stack(means).mean())
    torch.testing.assert_close(found["loss/complement"], per_token[:, 1].mean())


@pytest.mark.parametrize("softcap", [30.0, None])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_family_trains_under_bf16_with_its_loss_in_fp32(kind: str, softcap: float | None, tmp_path: Path) -> None:
    method = make(tmp_path, kind, softcap=softcap)
    images, draw = batch(method, 1), method.draw(keys(1))
    exact = method(images, draw)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(images, draw)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    # bf16 keeps 8 bits; the mean of a thousand squared errors stays within a percent
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    silent = [
        n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert silent == []


@pytest.mark.parametrize("kind", ["clip", "eva02", "beit"])
def test_a_compiled_method_gives_the_same_gradients_with_and_without_checkpointing(kind: str, tmp_path: Path) -> None:
    plain = make(tmp_path, kind, args={"depth": 1}, decoder_depth=1)
    images, draw = batch(plain, 1), plain.draw(keys(1))
    plain(images, draw)["loss"].backward()
    for checkpointing in (False, True):
        method = make(tmp_path, kind, args={"depth": 1}, decoder_depth=1)
        names = list(method.state_dict())
        if checkpointing:
            method.enable_grad_checkpointing()
        method.compile(backend="aot_eager", fullgraph=True)
        method(images, draw)["loss"].backward()
        for (name, p), q in zip(plain.named_parameters(), method.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=name)
        assert list(method.state_dict()) == names
    torch._dynamo.reset()


def test_state_goes_to_another_instance_whole(tmp_path: Path) -> None:
    method = make(tmp_path)
    method.target_scale.fill_(0.5)
    other = create_method("maskembed", MaskEmbedConfig(), model=str(tmp_path), pretrained=False, seed=5)
    other.load_state_dict({**method.frozen_state(), **method.training_state()}, strict=True)
    draw = method.draw(keys())
    assert torch.equal(other(batch(method), draw)["loss"], method(batch(method), draw)["loss"])


@pytest.mark.parametrize("decay_all", [True, False])
def test_weight_decay_is_on_everything_or_spares_vectors(decay_all: bool, tmp_path: Path) -> None:
    method = make(tmp_path, optim=OptimConfig(weight_decay=0.03, decay_all=decay_all))
    decay = {id(p): group["weight_decay"] for group in method.parameter_groups() for p in group["params"]}
    trainable = [p for p in method.parameters() if p.requires_grad]
    assert decay.keys() == {id(p) for p in trainable}
    assert all(decay[id(p)] == (0.03 if decay_all or p.ndim > 1 else 0.0) for p in trainable)


@pytest.mark.parametrize(("width", "lr"), [(64, 3e-4), (768, 3e-4), (1024, 2e-4)])
def test_large_models_learn_more_slowly(width: int, lr: float, tmp_path: Path) -> None:
    method = make(tmp_path, args={"embed_dim": width, "depth": 1}, decoder_depth=1)
    assert method.defaults() == {"epochs": 5, "batch_size": 1024, "lr": lr}


def test_images_are_cropped_as_asked_and_normalised_as_the_teacher_wants(tmp_path: Path) -> None:
    method = make(tmp_path, "clip", crop="random_resized", flip=False, randaugment="rand-m9")
    view = method.image_spec().views["image"]
    assert (view.size, view.mean, view.std) == ((64, 64), method.teacher.mean, method.teacher.std)
    assert (view.crop, view.flip, view.color) == ("random_resized", False, "rand-m9")
    held_out = method.validation_spec().views["image"]
    assert (held_out.crop, held_out.flip, held_out.color) == ("center", False, None)
    assert (held_out.crop_pct, held_out.interpolation) == (method.teacher.crop_pct, method.teacher.interpolation)
    default = make(tmp_path).image_spec().views["image"]
    assert (default.crop, default.flip, default.color) == ("zoom_center", True, None)


@pytest.mark.gpu
@pytest.mark.parametrize("masking", ["uniform", "bernoulli", "block"])
def test_masks_are_the_same_bits_on_a_gpu(masking: str, tmp_path: Path) -> None:
    method = make(tmp_path, masking=masking)
    assert torch.equal(method.draw(keys(5000).to("cuda")).visible.cpu(), method.draw(keys(5000)).visible)
