"""The split forward pass: masking, kept subsets, checkpointing, seeds."""

import copy
import gc

import pytest
import torch
from model_families import SMALL, images, small
from torch.nn import functional as F

from locfast.errors import UserError
from locfast.models.backbone import Backbone, load_backbone

MASKED = ("clip", "siglip", "dinov2_reg", "eva02", "beit")


def random_mask(backbone: Backbone, batch: int, views: int = 3) -> torch.Tensor:
    """[B, V, N], the last view all visible and the first all hidden for image 0."""
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(batch, views, backbone.num_patches, generator=generator) < 0.5
    visible[:, -1] = True
    visible[0, 0] = False
    return visible


def mask_pixels(backbone: Backbone, pixels: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Every view of every image with the hidden pixels at zero, left-over pixels too: [B * V, 3, H, W]."""
    height, width = (side * patch for side, patch in zip(backbone.grid, backbone.patch_size, strict=True))
    mask = F.interpolate(visible.flatten(0, 1).float().unflatten(1, (1, *backbone.grid)), (height, width))
    mask = F.pad(mask, (0, backbone.image_size[1] - width, 0, backbone.image_size[0] - height))
    return pixels.repeat_interleave(visible.shape[1], 0) * mask


def without_last_block(backbone: Backbone) -> torch.nn.Module:
    model = copy.deepcopy(backbone.model)
    model.blocks = model.blocks[:-1]
    return model


@torch.no_grad()
def assert_masked_features_equal_masked_pixels(backbone: Backbone, batch: int) -> None:
    pixels, visible = images(backbone, batch), random_mask(backbone, batch)
    expected = without_last_block(backbone).forward_features(mask_pixels(backbone, pixels, visible))
    features = backbone.masked_features(pixels, visible)
    assert features.shape == (batch, 3, backbone.num_tokens, backbone.embed_dim)
    scale = expected.abs().max().item()
    torch.testing.assert_close(features.flatten(0, 1), expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", MASKED)
def test_the_masked_teacher_equals_the_whole_model_on_masked_pixels(kind: str) -> None:
    assert_masked_features_equal_masked_pixels(small(kind), batch=2)


def test_the_masked_teacher_equals_masked_pixels_where_the_image_is_no_multiple_of_the_patch() -> None:
    """SO400M/14 at 384 px has 27 x 27 patches and 6 pixels left over."""
    backbone = load_backbone(
        "vit_so400m_patch14_siglip_384.webli", pretrained=False, depth=2, embed_dim=64, num_heads=4
    )
    assert backbone.grid == (27, 27)
    assert_masked_features_equal_masked_pixels(backbone.eval(), batch=1)


@torch.no_grad()
def test_the_last_layer_and_the_features_before_the_norm_can_be_had() -> None:
    backbone = small("clip")
    pixels = images(backbone)
    visible = torch.ones(2, 1, backbone.num_patches, dtype=torch.bool)
    last = backbone.masked_features(pixels, visible, stop=backbone.depth)[:, 0]
    torch.testing.assert_close(last, backbone.forward_features(pixels))
    raw = backbone.masked_features(pixels, visible, stop=backbone.depth, apply_norm=False)[:, 0]
    torch.testing.assert_close(backbone.model.norm(raw), last)
    assert not torch.allclose(raw, last)


@pytest.mark.parametrize("kind", MASKED)
def test_a_nan_in_a_hidden_patch_does_not_leak(kind: str) -> None:
    backbone = small(kind)
    pixels, visible = images(backbone), random_mask(backbone, 2)
    visible[:, :, 5] = False
    poisoned = pixels.clone()
    row, column = divmod(5, backbone.grid[1])
    p = backbone.patch_size[0]
    poisoned[:, :, row * p : row * p + p, column * p : column * p + p] = torch.nan
    features = backbone.masked_features(poisoned, visible)
    assert torch.equal(features, backbone.masked_features(pixels, visible))


@torch.no_grad()
def test_prefix_tokens_and_positions_are_added_alike_to_images_and_to_views() -> None:
    backbone = small("dinov2_reg")
    patches = backbone.embed_patches(images(backbone))
    tokens = backbone.add_prefix_and_position(patches)
    views = backbone.add_prefix_and_position(patches[:, None].expand(-1, 2, -1, -1))
    assert views.shape == (2, 2, backbone.num_tokens, backbone.embed_dim)
    assert torch.equal(views[:, 1], tokens)


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_a_kept_subset_equals_timm_with_the_other_tokens_hidden_by_an_attention_mask(kind: str) -> None:
    backbone = small(kind)
    prefix, patches = backbone.num_prefix_tokens, backbone.num_patches
    x = backbone.add_prefix_and_position(backbone.embed_patches(images(backbone, 2)))
    generator = torch.Generator().manual_seed(5)
    kept = torch.stack([torch.randperm(patches, generator=generator)[:7] for _ in range(2)])
    for sample in range(2):
        tokens = torch.cat([torch.arange(prefix), kept[sample] + prefix])
        mask = torch.full((backbone.num_tokens,), -torch.inf)
        mask[tokens] = 0
        expected = x[sample : sample + 1]
        rope = backbone.model.rope.get_embed() if backbone.family == "eva" else None
        for index, block in enumerate(backbone.model.blocks):
            hide = mask.expand(1, 1, backbone.num_tokens, -1)
            if backbone.family == "beit":
                expected = block(expected, shared_rel_pos_bias=hide)
            elif rope is not None:
                expected = block(expected, rope=rope[index] if rope.ndim == 4 else rope, attn_mask=hide)
            else:
                expected = block(expected, attn_mask=hide)
        some = torch.cat([torch.arange(prefix).expand(2, -1), kept + prefix], 1)
        got = backbone.run_blocks(x.gather(1, some[..., None].expand(-1, -1, x.shape[-1])), kept=kept)
        scale = expected.abs().max().item()
        torch.testing.assert_close(got[sample], expected[0, tokens], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_keeping_all_patches_equals_keeping_no_list(kind: str) -> None:
    backbone = small(kind)
    x = backbone.add_prefix_and_position(backbone.embed_patches(images(backbone)))
    everything = torch.arange(backbone.num_patches).expand(2, -1)
    torch.testing.assert_close(backbone.run_blocks(x, kept=everything), backbone.run_blocks(x))


@pytest.mark.parametrize("kind", ["clip", "eva02", "beit"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    backbone = small(kind)
    gradients = []
    for checkpointing in (False, True):
        backbone.zero_grad()
        backbone(images(backbone), softcap=5.0, checkpointing=checkpointing).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("kind", SMALL)
def test_every_parameter_that_features_need_gets_a_gradient_and_no_other_asks_for_one(kind: str) -> None:
    backbone = small(kind)
    backbone(images(backbone), softcap=20.0).square().mean().backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    assert all(name.startswith(("model.attn_pool.", "model.fc_norm.")) for name in frozen)


def test_blocks_can_be_run_in_parts() -> None:
    backbone = small("eva02")
    x = backbone.add_prefix_and_position(backbone.embed_patches(images(backbone)))
    parts = backbone.run_blocks(backbone.run_blocks(x, stop=1), start=1)
    torch.testing.assert_close(parts, backbone.run_blocks(x))


def test_fresh_weights_come_from_the_seed_alone_and_leave_the_global_generator_as_it_was() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = small("clip", seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    again, other = small("clip", seed=7).state_dict(), small("clip", seed=8).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["model.blocks.0.attn.qkv.weight"], other["model.blocks.0.attn.qkv.weight"])


def test_features_have_the_dtype_that_autocast_gives() -> None:
    backbone = small("siglip")
    visible = random_mask(backbone, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone.embed_patches(images(backbone)).dtype == torch.bfloat16
        mixed = backbone.masked_features(images(backbone), visible, apply_norm=False)
    full = backbone.masked_features(images(backbone), visible, apply_norm=False)
    # bf16 keeps 8 bits: two blocks of a few roundings each stay within a few percent.
    assert ((mixed - full).norm() / full.norm()).item() < 0.03


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="takes images of"):
        small("clip").embed_patches(torch.zeros(1, 3, 80, 80))


@pytest.mark.parametrize(("size", "told"), [(0, "positive"), (-16, "positive"), (7, "no whole patch")])
def test_a_size_without_a_patch_is_refused(size: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=size, depth=1)


@pytest.mark.parametrize("size", [65, 70])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=rf"{size - 64} px of every side .* Type --image-size 64 or 80"):
        load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=size, depth=1)


def test_a_models_own_size_may_be_no_multiple_of_its_patch() -> None:
    small_args = {"depth": 1, "embed_dim": 64, "num_heads": 4}
    name = "vit_so400m_patch14_siglip_384.webli"
    assert load_backbone(name, pretrained=False, image_size=384, **small_args).grid == (27, 27)
    with pytest.raises(UserError, match="--image-size 378 or 392"):
        load_backbone(name, pretrained=False, image_size=385, **small_args)


@pytest.mark.parametrize(
    ("named", "taken"), [("lanczos", "lanczos"), ("bilinear", "bilinear"), ("cubic-ish", "bicubic")]
)
def test_an_interpolation_that_does_not_exist_becomes_bicubic_with_a_warning(
    named: str, taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = small("clip").model
    model.pretrained_cfg["interpolation"] = named
    assert Backbone(model, "odd").interpolation == taken
    assert [record.args for record in caplog.records] == ([] if named == taken else [("odd", named)])


def test_overlapping_patches_are_refused() -> None:
    model = small("clip").model
    model.patch_embed.proj.stride = (8, 8)
    with pytest.raises(UserError, match="kernel = stride"):
        Backbone(model, "overlapping")


def test_parallel_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="parallel branches"):
        load_backbone("vit_base_patch16_xp_224", pretrained=False, depth=1, embed_dim=64, num_heads=4)


def test_blocks_that_only_timm_can_run_are_refused_a_cap_but_run_without() -> None:
    """A post-norm EVA is such a model."""
    backbone = load_backbone("eva02_enormous_patch14_clip_224", pretrained=False, depth=2, embed_dim=64, num_heads=4)
    backbone.eval().double()
    with torch.no_grad():
        pixels = images(backbone).double()
        torch.testing.assert_close(backbone(pixels), backbone.model.forward_features(pixels), rtol=1e-12, atol=1e-12)
    backbone.float()
    with pytest.raises(UserError, match="EvaBlockPostNorm"):
        backbone(images(backbone), softcap=30.0)


def test_a_checkpointed_block_keeps_its_input_and_nothing_else() -> None:
    backbone = small("clip", depth=6).train()
    pixels = images(backbone)
    kept = []
    for checkpointing in (False, True):
        before = _alive(backbone)
        out = backbone(pixels, checkpointing=checkpointing)
        kept.append(_alive(backbone) - before)
        del out
    # an input a block; what the norms before the first and behind the last of CLIP's blocks keep; the output
    assert kept[1] <= backbone.depth + 3 < kept[0]


def _alive(backbone: Backbone) -> int:
    """Tensors [2, T, C] that Python holds, autograd's saved ones among them where a checkpoint holds them."""
    gc.collect()
    shape = (2, backbone.num_tokens, backbone.embed_dim)
    found = [t for t in gc.get_objects() if type(t) is torch.Tensor and tuple(t.shape) == shape]
    return len({t.data_ptr() for t in found})
