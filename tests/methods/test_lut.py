"""LUT's arithmetic against the paper, written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from locfast.config.lut import LUTConfig
from locfast.errors import UserError
from locfast.methods import create_method
from locfast.methods.lut import LUT, Draw
from locfast.models.scratch import sincos_positions
from locfast.random import Keys

MODEL = "vit_tiny_patch16_224"
SIZE = 64  # a grid of 4 x 4, of which 4 patches are visible
SMALL = {"head_width": 48, "decoder_depth": 2, "decoder_width": 32, "decoder_heads": 4}


def make(model: str = MODEL, image_size: int = SIZE, seed: int = 0, **fields) -> LUT:
    config = LUTConfig(**{**SMALL, **fields})
    method = create_method("lut", config, model=model, pretrained=False, image_size=image_size, seed=seed)
    assert isinstance(method, LUT)
    return method


def keys(samples: int = 4, seed: int = 0) -> Keys:
    return Keys(seed, torch.zeros(samples, dtype=torch.int64), torch.arange(samples))


def batch(samples: int = 4, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    views = {name: torch.randn(samples, 3, SIZE, SIZE, generator=generator) for name in ("image", "context")}
    return {"views": views}


def run(method: LUT, given: dict | None = None, draw: Draw | None = None) -> dict[str, torch.Tensor]:
    given = given or batch()
    return method(given, draw or method.draw(keys(len(given["views"]["image"]))))


@pytest.fixture(scope="module")
def default() -> LUT:
    return make()


def test_loss_is_equation_three_written_out() -> None:
    method = make()
    given, draw = batch(), method.draw(keys())
    with torch.no_grad():  # the momentum encoder differs from the encoder, and its running statistics from none
        for parameter in method.momentum.parameters():
            parameter += 0.01
        method.momentum.heads["context"].norm.running_mean += 0.1
    out = method(given, draw)

    model, decoder = method.encoder.model, method.autoencoder.decoder
    pooled, errors = [], []
    for image, seen in zip(given["views"]["image"], draw.visible[:, 0], strict=True):
        tokens = model.patch_embed(image[None])[0] + model.pos_embed[0, 1:]
        x = torch.cat([model.cls_token[0] + model.pos_embed[0, :1], tokens[seen]])[None]
        encoded = model.norm(model.blocks(x))[0]
        pooled.append(encoded[1:].mean(0))
        placed = decoder.mask_token[0].expand(16, -1).clone()
        placed[seen] = decoder.embed(encoded[1:])
        y = torch.cat([decoder.embed(encoded[:1]), placed])
        y = y + torch.cat([torch.zeros(1, 32), sincos_positions((4, 4), 32)])
        for block in decoder.blocks:
            y = block(y[None])[0]
        rebuilt = decoder.output(decoder.norm(y))[1:]
        for place in range(16):
            if not seen[place]:
                row, column = 16 * (place // 4), 16 * (place % 4)
                pixels = image[:, row : row + 16, column : column + 16].flatten()
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
                errors.append((rebuilt[place] - pixels).square().mean())
    reconstruction = torch.stack(errors).mean()

    def mlp(layers, x, norm):
        return norm(x @ layers.expand.weight.T).relu() @ layers.contract.weight.T

    def of_batch(x):
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    u = mlp(method.predictors["context"], mlp(method.heads["context"], torch.stack(pooled), of_batch), of_batch)
    teacher = method.momentum.encoder.model.forward_features(given["views"]["context"])[:, 1:].mean(1)
    head = method.momentum.heads["context"]
    # every parameter of the copy was moved, the batch norm's own too
    v = mlp(head, teacher, lambda x: (x - 0.1) / (1 + 1e-5) ** 0.5 * 1.01 + 0.01)
    context = (u / u.norm(dim=1, keepdim=True) - v / v.norm(dim=1, keepdim=True)).square().sum(1).mean()
    # fp32 sums in another order
    torch.testing.assert_close(out["loss/reconstruction"], reconstruction, rtol=2e-5, atol=0)
    torch.testing.assert_close(out["loss/context"], context, rtol=2e-5, atol=0)
    torch.testing.assert_close(out["loss"], reconstruction + 1.0 * context, rtol=2e-5, atol=0)


def test_only_hidden_patches_are_rebuilt_and_only_visible_ones_are_seen(default: LUT) -> None:
    draw, given = default.draw(keys()), batch()
    shown = draw.visible[:, 0].view(-1, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    masked = default.encode(given["views"]["image"], draw.visible[:, 0], rebuild=True)
    other = torch.where(shown, given["views"]["image"], 7.0)
    assert torch.equal(default.encode(other, draw.visible[:, 0], rebuild=True).pixels, masked.pixels)
    # of visible patches the pixels as a target say nothing
    loss = default.reconstruction(masked, given["views"]["image"], draw.visible[:, 0])
    elsewhere = torch.where(shown, 7.0, given["views"]["image"])
    assert torch.equal(default.reconstruction(masked, elsewhere, draw.visible[:, 0]), loss)
    assert not torch.equal(default.reconstruction(masked, other, draw.visible[:, 0]), loss)


def test_the_papers_form_shows_the_context_view_to_the_momentum_encoder_alone(default: LUT) -> None:
    draw, given = default.draw(keys()), batch()
    other = {"views": {**given["views"], "context": batch(seed=2)["views"]["context"]}}
    one, two = run(default, given, draw), run(default, other, draw)
    assert torch.equal(one["loss/reconstruction"], two["loss/reconstruction"])
    assert not torch.equal(one["loss/context"], two["loss/context"])
    context = given["views"]["context"].requires_grad_()
    run(default, given, draw)["loss"].backward()
    assert context.grad is None
    default.zero_grad()


def test_the_references_form_is_symmetric_in_its_views() -> None:
    method = make(form="reference")
    given, draw = batch(), method.draw(keys())
    views = given["views"]
    swapped = {"views": {"image": views["context"], "context": views["image"]}}
    one, two = run(method, given, draw), run(method, swapped, Draw(draw.visible.flip(1)))
    torch.testing.assert_close(one["loss/context"], two["loss/context"], rtol=1e-6, atol=0)
    assert abs(one["loss/reconstruction"] - two["loss/reconstruction"]) > 1e-4  # of the first view alone


def test_the_references_masks_are_disjoint_and_of_one_permutation() -> None:
    method = make(form="reference")
    visible = method.draw(keys(64)).visible
    assert visible.shape == (64, 2, 16) and (visible.sum(-1) == 4).all()
    assert not visible.all(1).any()
    assert torch.equal(visible[:, :1], make().draw(keys(64)).visible)
    assert (visible[:, 1].sum(0) > 4).all()  # every place is taken, some 16 times


def test_the_momentum_encoder_gets_no_gradient_and_moves_after_a_step() -> None:
    method = make()
    run(method)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.momentum.parameters())
    assert not any(module.training for module in method.train().momentum.modules())
    assert method.frozen_state() == {}
    assert {k for k in method.training_state() if k.startswith("momentum.")} == {
        k for k in method.state_dict() if k.startswith("momentum.")
    }
    with torch.no_grad():
        method.encoder.model.norm.bias += 1.0
    before = method.momentum.encoder.model.norm.bias.clone()
    method.after_step(1, 10)
    torch.testing.assert_close(method.momentum.encoder.model.norm.bias, before + 0.004, rtol=0, atol=1e-7)
    assert not any(p.requires_grad for p in method.momentum.parameters())


@pytest.mark.parametrize(("form", "moved"), [("paper", [0.004] * 3), ("reference", [0.004, 0.003, 0.001])])
def test_momentum_stays_in_the_papers_form_and_goes_to_one_in_the_references(form: str, moved: list[float]) -> None:
    method = make(form=form)
    steps = []
    for step in range(3):
        with torch.no_grad():
            method.momentum.encoder.model.norm.bias.zero_()
            method.encoder.model.norm.bias.fill_(1.0)
        method.after_step(step + 1, 3)
        steps.append(float(method.momentum.encoder.model.norm.bias[0]))
    assert steps == pytest.approx(moved, abs=1e-7)  # one minus fp32's nearest to 0.996


ALTERNATIVES: list[dict] = [
    {"form": "reference"},
    {"encoding": "mask_tokens"},
    {"encoding": "mask_tokens", "form": "reference", "mask_ratio": 0.75},
    {"mask_ratio": 0.5},
    {"mask_unit": 2},
    {"norm_pix": False},
    {"context_weight": 0.5},
    {"predictor": False},
    {"context_tokens": "cls"},
    {"supervision": "token"},
    {"supervision": "both"},
    {"distance": "smooth_l1"},
    {"distance": "info_nce"},
    {"distance": "info_nce", "temperature": 0.1},
    {"steer": "all"},
    {"steer": "all", "supervision": "token"},
    {"steer": "all", "encoding": "mask_tokens"},
    {"steer": "all", "form": "reference"},
    {"target_mask_ratio": 0.5},
    {"target_mask_ratio": 0.5, "form": "reference"},
    {"head_width": 64},
    {"decoder_depth": 1},
    {"positions": "model"},
    {"init": "pretrained"},
]


@pytest.mark.parametrize("fields", ALTERNATIVES, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()))
def test_every_alternative_trains_and_changes_the_loss(fields: dict, default: LUT) -> None:
    method = make(**fields)
    out = run(method)
    out["loss"].backward()
    trainable = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None] == []  # DDP would wait for it
    assert torch.isfinite(out["loss"]) and sum(float(p.grad.abs().sum()) for p in trainable.values()) > 0
    assert out["loss"].item() != run(default)["loss"].item()
    assert 0 < out["spread"] <= 1


def test_token_wise_supervision_compares_tokens_of_the_same_place() -> None:
    """Where both views are one image, nothing is masked from the momentum encoder, and it is the encoder itself."""
    method = make(supervision="token", predictor=False).eval()
    given, draw = batch(), method.draw(keys())
    masked = method.encode(given["views"]["image"], draw.visible[:, 0], rebuild=False)
    whole = torch.zeros(4, 17, 192)
    for image in range(4):  # what the encoder said of its visible patches, at their places; nothing elsewhere
        whole[image, 1:][draw.visible[image, 0]] = masked.patches[image].detach()
    assert method.context(masked, whole) < 1e-10
    assert method.context(masked, whole.flip(1)) > 0.1


def test_steering_all_tokens_pools_over_hidden_ones_too() -> None:
    method = make(steer="all")
    given, draw = batch(), method.draw(keys())
    masked = method.encode(given["views"]["image"], draw.visible[:, 0], rebuild=True)
    assert masked.patches.shape == (4, 16, 192)
    plain = make().encode(given["views"]["image"], draw.visible[:, 0], rebuild=True).patches
    seen = masked.patches[draw.visible[:, 0]].view(4, 4, 192)
    torch.testing.assert_close(seen, plain, rtol=0, atol=0)
    gradient = torch.autograd.grad(method.context(masked, torch.randn(4, 17, 192)), method.autoencoder.lift.weight)[0]
    assert gradient.abs().sum() > 0


def test_simmims_form_is_simmims() -> None:
    """Squares of 2 x 2 patches, the absolute error of plain pixels, hidden patches not dropped."""
    method = make(image_size=128, encoding="mask_tokens", mask_ratio=0.5)
    draw = method.draw(keys())
    squares = draw.visible[:, 0].view(4, 4, 2, 4, 2).transpose(2, 3).flatten(3)
    assert (squares.all(-1) == squares.any(-1)).all() and (draw.visible.sum(-1) == 32).all()
    images = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    masked = method.encode(images, draw.visible[:, 0], rebuild=True)
    assert masked.tokens.shape == (4, 65, 192) and masked.patches.shape == (4, 32, 192)
    loss = method.reconstruction(masked, images, draw.visible[:, 0])
    pixels = images.view(4, 3, 8, 16, 8, 16).permute(0, 2, 4, 1, 3, 5).reshape(4, 64, -1)
    errors = (masked.pixels - pixels).abs().mean(-1)[~draw.visible[:, 0]]
    torch.testing.assert_close(loss, errors.mean(), rtol=1e-6, atol=0)
    hidden = torch.where(draw.visible[:, 0].view(4, 1, 8, 1, 8, 1), images.view(4, 3, 8, 16, 8, 16), 9.0)
    again = method.encode(hidden.reshape(images.shape), draw.visible[:, 0], rebuild=True)
    assert torch.equal(again.tokens, masked.tokens)


def test_validation_is_the_same_twice_and_moves_no_statistics(default: LUT) -> None:
    default.eval()
    before = {k: v.clone() for k, v in default.state_dict().items()}
    with torch.no_grad():
        one, two = run(default), run(default)
        alone = [
            run(
                default,
                {"views": {n: v[i : i + 1] for n, v in batch()["views"].items()}},
                Draw(default.draw(keys()).visible[i : i + 1]),
            )
            for i in range(4)
        ]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(before[k], v) for k, v in default.state_dict().items())
    mean = torch.stack([out["loss"] for out in alone]).mean()
    torch.testing.assert_close(one["loss"], mean, rtol=1e-5, atol=0)
    default.train()


def test_draws_are_the_samples_own_and_targets_have_their_own_stream() -> None:
    method = make(form="reference", target_mask_ratio=0.5)
    whole = method.draw(keys(5))
    one = method.draw(Keys(0, torch.tensor([0]), torch.tensor([3])))
    assert torch.equal(whole.visible[3:4], one.visible) and torch.equal(whole.target_visible[3:4], one.target_visible)
    assert (whole.target_visible.sum(-1) == 8).all()
    assert not torch.equal(whole.target_visible[:, 0], whole.target_visible[:, 1])
    assert torch.equal(whole.visible, make(form="reference").draw(keys(5)).visible)


def test_seed_fixes_the_initialisation_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.encoder.model.blocks[0].attn.qkv.weight, c.encoder.model.blocks[0].attn.qkv.weight)


def test_from_scratch_positions_are_fixed_and_colours_are_imagenets() -> None:
    encoder = make().encoder
    position = encoder.model.pos_embed
    assert not position.requires_grad and torch.equal(position[0, 0], torch.zeros(192))
    assert torch.equal(position[0, 1:], sincos_positions((4, 4), 192))
    assert encoder.mean == (0.485, 0.456, 0.406) and encoder.model.pretrained_cfg["license"] is None
    kept = make(init="pretrained").encoder
    assert kept.model.pos_embed.requires_grad and kept.mean == (0.5, 0.5, 0.5)


def test_grad_checkpointing_changes_no_gradient() -> None:
    plain, recomputed = make(), make()
    recomputed.enable_grad_checkpointing()
    for method in (plain, recomputed):
        run(method)["loss"].backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_bf16_stays_near_fp32_and_norms_in_fp32(default: LUT) -> None:
    exact = run(default)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(default)
    assert rounded["loss"].dtype == torch.float32
    for name in ("loss/reconstruction", "loss/context"):
        assert rounded[name] != exact[name]
        # bf16 has 8 bits, 0.4 % an operation; batch norm over four images magnifies it
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.05, atol=0)


def test_defaults_follow_section_five() -> None:
    config = LUTConfig()
    optim = dataclasses.asdict(config.optim)
    assert (config.hidden_share, config.momentum, config.last_momentum, config.unit) == (0.75, 0.996, 0.996, 1)
    assert (config.decoder_depth, config.decoder_width, config.decoder_heads, config.head_width) == (8, 512, 16, 4096)
    assert optim["betas"] == (0.9, 0.95) and optim["weight_decay"] == 0.05 and optim["clip"] is None
    assert optim["warmup_epochs"] == 40 and optim["final_lr_ratio"] == 0 and not optim["decay_all"]
    assert make().defaults() == {"epochs": 1600, "batch_size": 4096, "lr": pytest.approx(2.4e-3)}
    assert LUTConfig(form="reference").last_momentum == 1.0
    weights = {"vit_small_patch16_224": 1.0, "vit_base_patch16_224": 0.25}
    assert {model: make(model).weight for model in weights} == weights
    decayed, spared = make().parameter_groups()
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert all(p.ndim == 1 for p in spared["params"])


def test_views_have_crops_of_their_own_and_colours_on_the_context_alone() -> None:
    views = make(crop="random_resized").image_spec().views
    assert list(views) == ["image", "context"]
    assert all((view.crop, view.scale, view.flip) == ("random_resized", (0.2, 1.0), True) for view in views.values())
    assert (views["image"].color, views["context"].color) == (None, "jitter-0.4-0.4-0.2-0.1+three")
    assert all((view.crop, view.color) == ("center", None) for view in make().validation_spec().views.values())


def test_seen_shows_masks_over_the_views_that_are_masked() -> None:
    method = make()
    seen = method.seen(batch(), method.draw(keys()))
    assert seen["image"].visible.shape == (4, 1, 4, 4) and seen["image"].masks == ("visible",)
    assert seen["context"].visible is None
    method = make(form="reference", target_mask_ratio=0.25)
    seen = method.seen(batch(), method.draw(keys()))
    assert all(set(one.masks) == {"visible", "target"} and one.visible.shape == (4, 2, 4, 4) for one in seen.values())


def test_a_run_is_told_what_batch_norm_sees() -> None:
    method = make(distance="info_nce")
    assert method.notes(8, 2, 1) == []
    norm, negatives = method.notes(8, 2, 4)
    assert "sees 16 of the 64 images" in norm and "the same 16 images" in negatives
    with pytest.raises(UserError, match="two images at a time"):
        make().notes(1, 1, 4)
    assert make().notes(1, 2, 1) == []
    assert make(supervision="token").notes(1, 1, 1) == []  # many tokens of one image


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mask_ratio": 0.99}, "--lut.mask-ratio 0.99 leaves 0 of 16 places visible"),
        ({"mask_ratio": 1.0}, "must lie in"),
        ({"target_mask_ratio": 0.99}, "--lut.target-mask-ratio 0.99 leaves 0 of 16"),
        ({"form": "reference", "mask_ratio": 0.4}, "at least 0.5"),
        ({"model": "vit_base_patch16_siglip_224", "context_tokens": "cls"}, "has no CLS token"),
        ({"mask_unit": 3}, "do not tile"),
        ({"init": "pretrained", "positions": "sincos"}, "use --lut.positions model"),
        ({"distance": "info_nce", "supervision": "both"}, "use --lut.supervision context"),
        ({"target_mask_ratio": 0.5, "supervision": "token"}, "use --lut.supervision context"),
        ({"steer": "all", "context_tokens": "cls"}, "use --lut.context-tokens pooled"),
        ({"decoder_width": 34}, "multiple of decoder_heads"),
        ({"crop_scale": (0.5, 0.2)}, "smaller one first"),
        ({"momentum": 1.5}, "momentum must lie in"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"context_weight": -0.1}, "context_weight must not be negative"),
        ({"form": "papr"}, "form must be one of paper, reference"),
        (
            {"model": "beit_base_patch16_224"},
            "has no absolute position embeddings; use the model's own: --lut.positions",
        ),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_told_in_one_sentence(fields: dict, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        make(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224"])
def test_other_families_train_too(model: str) -> None:
    size = 56 if "14" in model else 64
    method = make(model, image_size=size, positions="model")
    views = {name: torch.randn(2, 3, size, size) for name in ("image", "context")}
    run(method, {"views": views})["loss"].backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_norm_pix_targets_have_mean_zero_and_deviation_one() -> None:
    from locfast.models.pixel_decoder import patch_pixels

    images = 3 + 5 * torch.randn(2, 3, SIZE, SIZE)
    target = patch_pixels(images, (16, 16), normalise=True)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.std(-1), torch.ones(2, 16), rtol=1e-5, atol=0)
    plain = patch_pixels(images, (16, 16), normalise=False)
    assert torch.equal(plain[:, 5], images[:, :, 16:32, 16:32].flatten(1))
    flat = patch_pixels(torch.ones(1, 3, SIZE, SIZE), (16, 16), normalise=True)
    assert torch.equal(flat, torch.zeros_like(flat))  # and no NaN


def test_the_context_loss_is_two_minus_two_cosines() -> None:
    from locfast.methods.context_loss import distance, spread

    p, t = torch.randn(2, 5, 8, dtype=torch.float64)
    cosine = F.cosine_similarity(p, t)
    torch.testing.assert_close(distance(p, t, "cosine", 1.0, False), (2 - 2 * cosine).mean())
    logits = F.normalize(p, dim=1) @ F.normalize(t, dim=1).T / 0.2
    torch.testing.assert_close(distance(p, t, "info_nce", 0.2, True), -logits.log_softmax(1).diag().mean())
    gap = (p - t).abs()
    torch.testing.assert_close(
        distance(p, t, "smooth_l1", 1.0, False), torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
    )
    assert spread(p[:1].expand(5, -1)) < 1e-6 and spread(torch.cat([p, -p])) > 0.99


def test_a_context_weight_of_zero_is_masked_autoencoding_alone() -> None:
    """The same encoder, decoder and masks, one view, nothing that follows, and every weight has its gradient."""
    method, whole = make(context_weight=0.0), make()
    given, draw = batch(), whole.draw(keys())
    alone = method({"views": {"image": given["views"]["image"]}}, draw)
    assert torch.equal(alone["loss"], whole(given, draw)["loss/reconstruction"])
    assert torch.equal(method.draw(keys()).visible, draw.visible)
    assert list(method.image_spec().views) == list(method.validation_spec().views) == ["image"]
    assert not list(method.momentum.parameters()) and "loss/context" not in alone
    alone["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters() if parameter.requires_grad)
    method.after_step(1, 3)
    assert list(method.seen({"views": {"image": given["views"]["image"]}}, draw)) == ["image"]


@pytest.mark.parametrize(
    ("patches", "fields", "visible"),
    [
        (14, {}, 49),  # MAE keeps a quarter of 196
        (16, {}, 64),
        (14, {"encoding": "mask_tokens"}, 76),  # SimMIM hides 30 of 49 squares: 29.4, rounded up
    ],
)
def test_as_many_patches_are_visible_as_in_mae_and_simmim(patches: int, fields: dict, visible: int) -> None:
    method = make(image_size=16 * patches, **fields)
    assert (method.draw(keys()).visible.sum(-1) == visible).all()
