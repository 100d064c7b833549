"""FLOPs by part from shapes alone, against what PyTorch counts while the parts run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _step_flops import Shape, Way, forward_flops, step_flops, teacher_linear_flops
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from locfast.config.maskembed import MaskEmbedConfig
from locfast.kernels import _backend
from locfast.methods import maskembed
from locfast.methods.maskembed import MaskEmbed
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.blocks import run_block

BATCH = 2
SMALL: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64}, 30.0),
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", {"img_size": 64}, 30.0),
    "siglip": ("vit_base_patch16_siglip_224.webli", {"img_size": 64}, 30.0),
    "left-over pixels": ("vit_base_patch14_dinov2.lvd142m", {"img_size": 60}, 30.0),
    "registers": ("vit_base_patch14_reg4_dinov2.lvd142m", {"img_size": 56}, 30.0),
    "eva02": ("eva02_base_patch16_clip_224.merged2b", {"img_size": 64}, None),
    "beit": ("beit_base_patch16_224.in22k_ft_in22k_in1k", {"img_size": 64}, None),
}
"""By kind: timm name, arguments, soft cap; each at width 64, 4 heads and 3 blocks."""


@pytest.fixture(params=SMALL, scope="module")
def method(request) -> MaskEmbed:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return small(request.param, monkeypatch)


def small(kind: str, monkeypatch, **fields) -> MaskEmbed:
    name, arguments, softcap = SMALL[kind]

    def load(model: str, pretrained: bool, *, seed: int, image_size: int | None) -> Backbone:
        return load_backbone(model, pretrained, seed=seed, embed_dim=64, num_heads=4, depth=3, **arguments)

    monkeypatch.setattr(maskembed, "load_backbone", load)
    return MaskEmbed(MaskEmbedConfig(softcap=softcap, **fields), model=name, pretrained=False)


def inputs(method: MaskEmbed) -> tuple[Tensor, Tensor]:
    views = 1 + method.config.complement + method.config.all_visible
    visible = torch.rand(BATCH, views, method.teacher.num_patches) > 0.5
    return torch.randn(BATCH, 3, *method.teacher.image_size), visible


def count(run: Callable[[], Any]) -> tuple[Any, int]:
    """On the reference backend. PyTorch has no formula for its own fused attention on a CPU, so that runs unfused."""
    with _backend.use_backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = run()
    return out, counter.get_total_flops()


def forward_and_backward(
    module: Any, run: Callable[[Tensor | None], Tensor], x: Tensor | None
) -> tuple[Tensor, int, int]:
    """The output, its FLOPs, and those of the gradients of x, where there is one, and of all that trains."""
    leaves = [p for p in module.parameters() if p.requires_grad]
    if x is not None:
        x = x.detach().requires_grad_()
        leaves.append(x)
    out, forward = count(lambda: run(x))
    backward = count(lambda: torch.autograd.grad(out.sum(), leaves, allow_unused=True))[1]
    return out, forward, backward


def counted_student(method: MaskEmbed, images: Tensor, visible: Tensor) -> dict[str, int]:
    """Encoder, head and decoder as they run now."""
    prefix = method.encoder.num_prefix_tokens
    features, *encoder = forward_and_backward(method.encoder, lambda _: method.encoder(images), None)
    embeddings, *head = forward_and_backward(method.head, method.head, features)
    _, *decoder = forward_and_backward(method.decoder, lambda x: method.decoder(x[:, prefix:], visible), embeddings)
    parts = {"encoder": encoder, "head": head, "decoder": decoder}
    return {
        f"{part} {direction}": flops
        for part, pair in parts.items()
        for direction, flops in zip(("forward", "backward"), pair, strict=True)
    }


def counted_teacher(method: MaskEmbed, images: Tensor, visible: Tensor) -> dict[str, int]:
    """The teacher as it runs now."""
    embedding = count(lambda: method.teacher.embed_patches(images))[1]
    return {
        "teacher embedding": embedding,
        "teacher": count(lambda: method.target(images, visible))[1] - embedding,
    }


def public_teacher(method: MaskEmbed, images: Tensor, visible: Tensor) -> dict[str, int]:
    """Pixels are repeated and masked: every view is embedded, and goes through the blocks by itself."""
    teacher = method.teacher
    views = images.repeat_interleave(visible.shape[1], 0)
    patches, embedding = count(lambda: teacher.embed_patches(views))
    x = teacher.add_prefix_and_position(patches)
    stop = teacher.depth - (method.config.target == "penultimate")
    return {
        "teacher embedding": embedding,
        "teacher": count(lambda: teacher.run_blocks(x, stop=stop))[1],
    }


def public_decoder(method: MaskEmbed, images: Tensor, visible: Tensor) -> dict[str, int]:
    """Every view's tokens go through the blocks by themselves."""
    decoder: Any = method.decoder
    x = torch.randn(visible.shape[0] * visible.shape[1], method.encoder.num_tokens, method.encoder.embed_dim)

    def run(x: Tensor | None) -> Tensor:
        x = x + decoder.position
        for block in decoder.blocks:
            x = run_block(block, x)
        return decoder.output(decoder.norm(x))

    _, forward, backward = forward_and_backward(decoder, run, x)
    return {"decoder forward": forward, "decoder backward": backward}


def expected(method: MaskEmbed, way: Way, parts: dict[str, int]) -> dict[str, int]:
    return {part: step_flops(Shape.of(method), BATCH, way)[part] for part in parts}


def test_encoder_and_head_have_the_flops_that_are_counted(method):
    found = counted_student(method, *inputs(method))
    found = {part: flops for part, flops in found.items() if not part.startswith("decoder")}
    assert len(found) == 4 and all(found.values())
    assert found == expected(method, "locfast", found) == expected(method, "baseline", found)


def test_public_way_has_the_flops_that_are_counted(method):
    found = public_teacher(method, *inputs(method)) | public_decoder(method, *inputs(method))
    assert found == expected(method, "baseline", found)


def test_patches_are_embedded_once_an_image_for_all_views(method):
    found = counted_teacher(method, *inputs(method))["teacher embedding"]
    assert found == step_flops(Shape.of(method), BATCH, "locfast")["teacher embedding"]


def test_shared_way_has_the_flops_that_are_counted(method):
    images, visible = inputs(method)
    found = counted_teacher(method, images, visible) | counted_student(method, images, visible)
    assert found == step_flops(Shape.of(method), BATCH, "locfast")


@pytest.mark.parametrize(
    "fields",
    [{"target": "last"}, {"complement": False}, {"all_visible": False}, {"decoder_depth": 1}, {"head": "mlp"}],
    ids=str,
)
def test_flags_change_the_flops_as_they_change_what_is_counted(fields, monkeypatch):
    method, usual = small("vit", monkeypatch, **fields), small("vit", monkeypatch)
    found = public_teacher(method, *inputs(method)) | public_decoder(method, *inputs(method))
    found |= {part: flops for part, flops in counted_student(method, *inputs(method)).items() if part not in found}
    assert found == step_flops(Shape.of(method), BATCH, "baseline") != step_flops(Shape.of(usual), BATCH, "baseline")


def test_linear_layers_of_the_teacher_are_what_fp8_would_take(method):
    """All that is counted but the two products of attention, 2 x T x T x D multiply-adds a head."""
    images, visible = inputs(method)
    teacher, sequences = method.teacher, visible.shape[0] * visible.shape[1]
    heads = sequences * (teacher.depth - 1) * teacher.num_heads
    attention = heads * 2 * 2 * teacher.num_tokens**2 * teacher.head_dim
    counted = public_teacher(method, images, visible)["teacher"]
    assert teacher_linear_flops(Shape.of(method), BATCH, "baseline") == counted - attention


def test_fewer_patches_cost_what_a_smaller_image_costs(monkeypatch):
    whole = small("vit", monkeypatch)
    monkeypatch.setitem(SMALL, "vit", ("vit_tiny_patch16_224", {"img_size": 32}, 30.0))
    part = small("vit", monkeypatch)
    assert forward_flops(Shape.of(whole), 4) == forward_flops(Shape.of(part)) == count_forward(part)


def count_forward(method: MaskEmbed) -> int:
    return count(lambda: method.teacher(inputs(method)[0][:1]))[1]


def test_decoders_without_blocks_are_refused(monkeypatch):
    method = small("vit", monkeypatch, decoder="average", target="last_cls", masking="block")
    with pytest.raises(ValueError, match="average decoder has no blocks"):
        Shape.of(method)
