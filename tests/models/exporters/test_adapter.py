"""Vision-language adapters: what MaskEmbed trained, token by token, in a file that needs no locfast."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from locfast.errors import UserError
from locfast.models.decoder import PooledDecoder
from locfast.models.exporters.adapter import make_adapter, write_adapter
from locfast.models.exporters.folder import standalone
from tests.models.exporters.small import CAP, artifacts, noise, student


def decoded(parts: dict[str, Any], features: torch.Tensor) -> torch.Tensor:
    """What a run's own head and decoder make of features [B, T, C] with all patches visible, behind the norm."""
    patches = parts["head"](features)[:, parts["backbone"].num_prefix_tokens :]
    seen: list[torch.Tensor] = []
    handle = parts["decoder"].norm.register_forward_hook(lambda module, args, output: seen.append(output))
    parts["decoder"](patches, torch.ones(len(patches), 1, patches.shape[1], dtype=torch.bool))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "kind, head",
    [(kind, "linear") for kind in ("clip_quickgelu", "siglip", "dinov2_reg", "eva02", "beit")] + [("siglip", "mlp")],
)
@torch.no_grad()
def test_the_adapter_is_the_trained_decoder_up_to_its_norm_on_all_tokens(kind: str, head: str, tmp_path: Path) -> None:
    parts = artifacts(student(kind), head=head, depth=3)
    features = parts["backbone"](noise(parts["backbone"]))
    write_adapter(tmp_path, make_adapter(None, parts, CAP, 96, "prismatic"), features)
    adapter = standalone("maskembed_adapter").load_adapter(tmp_path).eval()
    torch.testing.assert_close(adapter.tokens(features), decoded(parts, features), rtol=1e-4, atol=1e-4)
    assert adapter(features).shape == (2, parts["backbone"].num_tokens, 96)
    assert len(adapter.blocks) == 3


@torch.no_grad()
def test_prefix_tokens_enter_by_their_positions_alone() -> None:
    parts = artifacts(student("dinov2_reg"))
    module = make_adapter("maskembed", parts, CAP, 96, "prismatic").module
    features = parts["backbone"](noise(parts["backbone"]))
    other = features.clone()
    other[:, :5] = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(module.tokens(features), module.tokens(other))
    other[:, 5] += 1
    assert not torch.allclose(module.tokens(features), module.tokens(other))


def test_the_adapter_keeps_the_activation_that_the_decoder_was_trained_with() -> None:
    acts = {"clip_quickgelu": "quick_gelu", "clip_gelu": "gelu", "siglip": "gelu", "eva02": "silu"}
    for kind, act in acts.items():
        config = make_adapter(None, artifacts(student(kind)), CAP, 96, "prismatic").module.config
        assert (config["act"], config["mlp"]) == (act, "swiglu" if kind == "eva02" else "mlp")


@torch.no_grad()
def test_gelu_in_place_of_quickgelu_would_be_seen() -> None:
    parts = artifacts(student("clip_quickgelu"))
    features = parts["backbone"](noise(parts["backbone"]))
    module = make_adapter(None, parts, CAP, 96, "llava").module
    before = module.tokens(features)
    for block in module.blocks:
        block.mlp.act = torch.nn.GELU()
    assert (module.tokens(features) - before).norm() / before.norm() > 1e-3


def test_the_new_layer_starts_at_zero_and_learns_first() -> None:
    parts = artifacts(student("siglip"))
    module = make_adapter(None, parts, CAP, 96, "llava").module
    out = module(parts["backbone"](noise(parts["backbone"])))
    assert not out.any()
    out.sum().backward()
    assert module.output.weight.grad.abs().sum() > 0
    assert not module.input.weight.grad.any()  # behind a zero layer; from the second step on it learns too


@torch.no_grad()
def test_another_width_of_the_language_model_gets_a_new_layer_and_the_rest_is_kept(tmp_path: Path) -> None:
    parts = artifacts(student("siglip"))
    features = parts["backbone"](noise(parts["backbone"]))
    write_adapter(tmp_path, make_adapter(None, parts, CAP, 96, "llava"), features)
    load = standalone("maskembed_adapter").load_adapter
    wide = load(tmp_path, llm_width=128).eval()
    assert wide(features).shape == (2, 16, 128)
    torch.testing.assert_close(wide.tokens(features), load(tmp_path).eval().tokens(features))


@pytest.mark.parametrize("kind", ["clip_quickgelu", "siglip", "dinov2_reg"])
@torch.no_grad()
def test_a_truncated_backbone_and_its_adapter_together_are_the_whole_backbone_with_its_cap(kind: str) -> None:
    backbone = student(kind)
    adapter = make_adapter("truncated", artifacts(backbone), CAP, 96, "prismatic")
    images = noise(backbone)
    assert (adapter.features.blocks, adapter.features.norm) == (2, False)
    tokens = adapter.module.tokens(adapter.features.of(backbone, images, CAP))
    torch.testing.assert_close(tokens, backbone(images, softcap=CAP), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_mlp_takes_patches_alone_and_is_the_same_on_every_export() -> None:
    backbone = student("clip_quickgelu")
    one, two = (make_adapter("mlp", artifacts(backbone), CAP, 96, "llava") for _ in range(2))
    features = one.features.of(backbone, noise(backbone), CAP)
    torch.testing.assert_close(features, backbone(noise(backbone), softcap=CAP)[:, 1:])
    assert one.module(features).shape == (2, 16, 96)
    assert torch.equal(one.module(features), two.module(features))
    layers = [type(layer).__name__ for layer in one.module.output]
    assert layers == ["Linear", "GELU", "Linear"]


def test_what_has_no_such_adapter_is_told_what_to_type() -> None:
    pooled = {**artifacts(student("siglip")), "decoder": PooledDecoder(average=True)}
    bare = {"backbone": student("siglip"), "softcap": None}
    for parts, found in ((pooled, "a PooledDecoder"), (bare, "no decoder")):
        with pytest.raises(UserError, match=f"this run has {found}.*--adapter truncated"):
            make_adapter(None, parts, None, 96, "llava")
    for kind in ("eva02", "beit"):
        with pytest.raises(UserError, match="no plain ViT blocks.*--adapter maskembed"):
            make_adapter("truncated", artifacts(student(kind)), None, 96, "prismatic")
    with pytest.raises(UserError, match="has 2 blocks"):
        make_adapter("truncated", artifacts(student("siglip", depth=2)), None, 96, "prismatic")


def test_features_of_another_backbone_are_refused() -> None:
    module = make_adapter(None, artifacts(student("clip_quickgelu")), CAP, 96, "llava").module
    with pytest.raises(ValueError, match=r"takes features \[B, 17, 64\], got \[2, 16, 64\]"):
        module(torch.zeros(2, 16, 64))


@torch.no_grad()
def test_the_adapter_runs_where_neither_locfast_nor_timm_can_be_imported(tmp_path: Path) -> None:
    """In a process of its own, from another folder, with nothing but torch and safetensors."""
    parts = artifacts(student("clip_quickgelu"))
    features = parts["backbone"](noise(parts["backbone"]))
    (tmp_path / "made").mkdir()
    write_adapter(tmp_path / "made", make_adapter(None, parts, CAP, 96, "llava"), features)
    shutil.move(tmp_path / "made", tmp_path / "elsewhere")
    save_file({"features": features, "expected": decoded(parts, features)}, tmp_path / "case.safetensors")
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("locfast", "timm", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from maskembed_adapter import load_adapter
from safetensors.torch import load_file
case = load_file("case.safetensors")
adapter = load_adapter("elsewhere").eval()
print(float((adapter.tokens(case["features"]) - case["expected"]).abs().max()), list(adapter(case["features"]).shape))
"""
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'elsewhere'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    difference, _, shape = told.stdout.strip().partition(" ")
    assert float(difference) < 1e-4 and shape == "[2, 17, 96]"
    assert json.loads((tmp_path / "elsewhere/adapter.json").read_text())["kind"] == "maskembed"


@pytest.mark.parametrize("module", ["timm_softcap", "aligned_tower"])
@torch.no_grad()
def test_autocast_does_not_round_the_logits_under_the_cap(module: str) -> None:
    """bf16 logits between 16 and 32 lie 0.125 apart, which the softmax turns into errors of several percent."""
    if module == "aligned_tower":
        pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(1, 2, 33, 16, generator=generator).bfloat16() for _ in range(3))
    attend = standalone(module).softcapped_attention
    expected = attend(q, k, v, 0.25, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, 0.25, 30.0)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(one, other) for one, other in pairs)
