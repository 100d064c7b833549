"""Attention without a cap: PyTorch's own bit for bit, and where flash-attn is refused."""

from typing import Any

import pytest
import torch
from model_families import images, small
from torch.nn import functional as F

from locfast.config.maskembed import MaskEmbedConfig
from locfast.errors import UserError
from locfast.methods import create_method
from locfast.methods.maskembed import MaskEmbed
from locfast.models.backbone import load_backbone
from locfast.models.decoder import TransformerDecoder
from locfast.models.softcap import set_softcap
from locfast.models.uncapped_attention import VERSIONS, find_flash_attn, uncapped_attention
from locfast.random import Keys

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def not_installed() -> None:
    for version in VERSIONS:
        try:
            __import__(version.module)
        except Exception:
            continue
        pytest.skip(f"{version.name} is installed here")


@pytest.mark.parametrize("biased", [False, True])
def test_sdpa_is_pytorchs_attention_bit_for_bit(biased: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 17, 16, generator=torch.Generator().manual_seed(0)).unbind()
    bias = torch.randn(1, 4, 17, 17, generator=torch.Generator().manual_seed(1)) if biased else None
    expected = F.scaled_dot_product_attention(q, k, v, bias, scale=0.3)
    assert torch.equal(uncapped_attention(q, k, v, 0.3, bias), expected)


@torch.no_grad()
def test_a_decoder_computes_what_timms_blocks_compute_bit_for_bit() -> None:
    decoder = TransformerDecoder(small("eva02"), depth=2, layer_scale=1.0)
    embeddings = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(2, 1, 16, dtype=torch.bool)
    expected = F.pad(embeddings, (0, 0, 1, 0)) + decoder.position
    for block in decoder.blocks:
        expected = block(expected)
    assert torch.equal(decoder(embeddings, visible)[:, 0], decoder.output(decoder.norm(expected)))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "biased", "why", "instead"),
    [
        (CPU, torch.bfloat16, 64, False, "CUDA devices, and the tensors are on cpu", ""),
        (CUDA, torch.float32, 64, False, "the tensors are float32", "or --precision bf16"),
        (CUDA, torch.float64, 64, False, "the tensors are float64", "or --precision bf16"),
        (CUDA, torch.bfloat16, 64, True, "it adds no bias", ""),
        (CUDA, torch.bfloat16, 264, False, "this model has 264", ""),
        (CUDA, torch.bfloat16, 60, False, "this model has 60", ""),
    ],
)
def test_flash_attn_is_refused_where_it_cannot_run(
    device: torch.device, dtype: torch.dtype, head_dim: int, biased: bool, why: str, instead: str
) -> None:
    with pytest.raises(UserError, match=why) as refused:
        find_flash_attn(device, dtype, head_dim, biased)
    assert "Type --maskembed.uncapped-attention sdpa" in str(refused.value)
    assert instead in str(refused.value)


@pytest.mark.usefixtures("not_installed")
def test_flash_attn_that_is_not_installed_is_told_with_every_name_that_was_tried() -> None:
    with pytest.raises(UserError, match="or install flash-attn") as refused:
        find_flash_attn(CUDA, torch.bfloat16, 64)
    assert all(f"import {version.module} fails (" in str(refused.value) for version in VERSIONS)


def test_flash_attn_reaches_the_attention_of_a_backbone_and_of_a_decoder() -> None:
    backbone = small("clip")
    visible = torch.ones(2, 1, 16, dtype=torch.bool)
    with pytest.raises(UserError, match="flash-attn was asked for, but it runs on CUDA devices"):
        backbone.masked_features(images(backbone), visible, uncapped="flash-attn")
    with pytest.raises(UserError, match="flash-attn was asked for, but it runs on CUDA devices"):
        backbone(images(backbone), uncapped="flash-attn")
    with pytest.raises(UserError, match="flash-attn was asked for, but it runs on CUDA devices"):
        TransformerDecoder(backbone, 1, 1.0, "flash-attn")(torch.zeros(2, 16, 64), visible)
    with pytest.raises(UserError, match="it adds no bias"):
        small("beit")(images(small("beit")), uncapped="flash-attn")


@torch.no_grad()
def test_a_capped_backbone_has_no_attention_for_flash_attn() -> None:
    backbone = set_softcap(small("clip"), 2.0)
    assert torch.equal(backbone(images(backbone), uncapped="flash-attn"), backbone(images(backbone)))


def test_flash_attn_is_refused_where_only_timm_can_run_the_blocks() -> None:
    backbone = load_backbone("eva02_enormous_patch14_clip_224", pretrained=False, depth=1, embed_dim=64, num_heads=4)
    with pytest.raises(UserError, match="flash-attn was asked for, but the blocks of eva02_enormous"):
        backbone(images(backbone), uncapped="flash-attn")
    with pytest.raises(UserError, match="EvaBlockPostNorm"):
        backbone.check_uncapped("flash-attn", CUDA, torch.bfloat16)


def method(**fields: Any) -> MaskEmbed:
    config = MaskEmbedConfig(**fields)
    made = create_method("maskembed", config, model="vit_tiny_patch16_224", pretrained=False, image_size=32)
    assert isinstance(made, MaskEmbed)
    return made


@pytest.mark.parametrize("part", ["teacher", "decoder", "encoder"])
def test_maskembed_asks_for_flash_attn_wherever_there_is_no_cap(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is asked first, so it is stepped over to see the others."""
    maskembed = method(softcap=None if part == "encoder" else 30.0, uncapped_attention="flash-attn")
    keys = Keys(0, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    if part != "teacher":
        monkeypatch.setattr(maskembed, "target", lambda images, visible: torch.zeros(2, 3, 5, 192))
    with pytest.raises(UserError, match="flash-attn was asked for") as refused:
        maskembed({"views": {"image": torch.zeros(2, 3, 32, 32)}}, maskembed.draw(keys))
    frames = [entry.locals.get("self") for entry in refused.traceback]
    assert any(frame is getattr(maskembed, part) for frame in frames)


def test_maskembed_says_beforehand_that_flash_attn_cannot_run() -> None:
    with pytest.raises(UserError, match="CUDA devices"):
        method(uncapped_attention="flash-attn").check(CPU, torch.bfloat16)
    method().check(CPU, torch.bfloat16)
    with pytest.raises(UserError, match="it adds no bias"):
        small("beit").check_uncapped("flash-attn", CUDA, torch.bfloat16)
    small("beit").check_uncapped("sdpa", CUDA, torch.bfloat16)
