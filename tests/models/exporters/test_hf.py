"""CLIP and SigLIP towers of transformers compute what was trained, with the cap and behind the norm, or say why not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from locfast.errors import UserError
from locfast.models.exporters.folder import standalone
from locfast.models.exporters.hf import write_hf_export
from locfast.models.exporters.hf_keys import hf_to_timm, timm_to_hf
from tests.models.exporters.small import CAP, noise, student

transformers = pytest.importorskip("transformers")
TOWERS = ("clip_quickgelu", "clip_gelu", "siglip")
BEHIND = ("attn_pool.", "fc_norm.", "head.")


@pytest.fixture(scope="module", params=TOWERS)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A backbone, the folder it was exported to, and the differences that were measured."""
    backbone = student(request.param)
    folder = tmp_path_factory.mktemp("hf") / "out"
    return backbone, folder, write_hf_export(backbone, folder, softcap=CAP, card={}, images=noise(backbone))


@pytest.mark.parametrize("kind", TOWERS)
def test_keys_to_transformers_and_back_give_every_weight_bit_by_bit(kind: str) -> None:
    state = {key: value for key, value in student(kind).model.state_dict().items() if not key.startswith(BEHIND)}
    there = timm_to_hf(state)
    for named in (there, {key.removeprefix("vision_model."): value for key, value in there.items()}):
        back = hf_to_timm(named)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_a_tower_that_transformers_made_computes_the_same_in_timm(kind: str) -> None:
    backbone = student(kind)
    shape: dict[str, Any] = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    shape |= dict(image_size=64, patch_size=16, hidden_act="quick_gelu" if kind == "clip_quickgelu" else "gelu")
    if kind == "siglip":
        tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**shape, vision_use_head=True)).eval()
    else:
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape)).eval()
    missing, extra = backbone.model.load_state_dict(hf_to_timm(tower.state_dict()), strict=False)
    assert not extra and all(key.startswith(BEHIND) for key in missing)
    theirs = standalone("aligned_tower").tower_features(tower, noise(backbone))
    torch.testing.assert_close(backbone(noise(backbone)), theirs, rtol=1e-4, atol=1e-5)  # other order of fp32 sums


@torch.no_grad()
def test_the_exported_tower_gives_the_trained_features_under_the_cap_and_behind_the_norm(
    export: tuple[Any, Path, Any],
) -> None:
    backbone, folder, _ = export
    tower = standalone("aligned_tower").load_tower(folder)
    assert tower.config._attn_implementation == f"locfast_softcap_{CAP:g}"
    features = standalone("aligned_tower").tower_features(tower, noise(backbone))
    torch.testing.assert_close(features, backbone(noise(backbone), softcap=CAP), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_reported_differences_are_those_of_a_reader_who_loads_without_cap_or_takes_other_tokens(
    export: tuple[Any, Path, Any],
) -> None:
    backbone, folder, differences = export
    kind = transformers.SiglipVisionModel if backbone.num_prefix_tokens == 0 else transformers.CLIPVisionModel
    plain, capped = kind.from_pretrained(folder), standalone("aligned_tower").load_tower(folder)
    images, patches = noise(backbone), slice(backbone.num_prefix_tokens, None)
    trained = backbone(images, softcap=CAP)[:, patches]

    def off(tokens: torch.Tensor) -> float:
        return ((tokens[:, patches] - trained).norm() / trained.norm()).item()

    normed = plain.post_layernorm(_before_norm(plain, images))
    assert differences.exported < 1e-5
    assert differences.without_cap == pytest.approx(off(normed), rel=1e-3) and differences.without_cap > 0.01
    assert differences.without_norm == pytest.approx(off(_before_norm(capped, images)), rel=1e-3)
    assert differences.penultimate == pytest.approx(off(capped(images, output_hidden_states=True).hidden_states[-2]))
    card = (folder / "README.md").read_text()
    assert f"| without the soft cap | {differences.without_cap:.2e} |" in card
    assert f"| one block earlier, without norm (LLaVA's layer -2) | {differences.penultimate:.2e} |" in card
    assert "Zero-shot classification" in card


def _before_norm(tower: Any, images: torch.Tensor) -> torch.Tensor:
    return tower.encoder(
        tower.pre_layrnorm(tower.embeddings(images)) if hasattr(tower, "pre_layrnorm") else tower.embeddings(images)
    ).last_hidden_state


@torch.no_grad()
def test_a_transformers_without_a_registry_of_attentions_gets_the_cap_into_its_modules(
    export: tuple[Any, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, folder, _ = export
    tower_file = standalone("aligned_tower")
    monkeypatch.setattr(tower_file, "AttentionInterface", None)
    tower = tower_file.load_tower(folder)
    assert "softcap" not in tower.config._attn_implementation
    features = tower_file.tower_features(tower, noise(backbone))
    torch.testing.assert_close(features, backbone(noise(backbone), softcap=CAP), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_tower_that_does_not_read_the_registry_gets_the_cap_into_its_modules(
    export: tuple[Any, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 4.51 has the registry, and its CLIP knows three attentions by name: KeyError without this."""
    backbone, folder, _ = export
    tower_file = standalone("aligned_tower")
    bare = {kind.__module__: SimpleNamespace() for kind in tower_file.TOWERS.values()}
    monkeypatch.setattr(tower_file, "sys", SimpleNamespace(modules=bare))
    tower = tower_file.load_tower(folder)
    assert "softcap" not in tower.config._attn_implementation
    features = tower_file.tower_features(tower, noise(backbone))
    torch.testing.assert_close(features, backbone(noise(backbone), softcap=CAP), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_transformers_that_makes_up_a_pooling_head_loads_siglip_and_loses_the_head(tmp_path: Path) -> None:
    """4.37, which LLaVA pins, does not know vision_use_head. The tokens lie before the head."""
    backbone = student("siglip")
    write_hf_export(backbone, tmp_path / "out", softcap=CAP, card={})
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "vision_use_head": True}))
    tower_file = standalone("aligned_tower")
    tower = tower_file.load_tower(tmp_path / "out")
    assert not any("head" in name for name, _ in tower.named_parameters())
    features = tower_file.tower_features(tower, noise(backbone))
    torch.testing.assert_close(features, backbone(noise(backbone), softcap=CAP), rtol=1e-4, atol=1e-4)


def test_the_image_processor_normalises_as_the_backbone_was_trained(export: tuple[Any, Path, Any]) -> None:
    backbone, folder, _ = export
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    found = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(value)[:, None, None] for value in (backbone.mean, backbone.std))
    torch.testing.assert_close(found, (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)
    wide = processor(images=Image.new("RGB", (90, 70)), return_tensors="pt")["pixel_values"]
    assert wide.shape == (1, 3, 64, 64)
    assert processor.resample == 3  # bicubic, as all three models were made with


def test_no_pooling_head_is_made_up_for_siglip(tmp_path: Path) -> None:
    write_hf_export(student("siglip"), tmp_path / "out", softcap=None, card={})
    tower, info = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any("head" in name for name, _ in tower.named_parameters())
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_tower_that_lacks_a_weight_is_not_loaded(tmp_path: Path) -> None:
    write_hf_export(student("clip_gelu"), tmp_path / "out", softcap=None, card={})
    file = tmp_path / "out/model.safetensors"
    state = load_file(file)
    del state["vision_model.post_layernorm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not hold a whole CLIPVisionModel.*post_layernorm"):
        standalone("aligned_tower").load_tower(tmp_path / "out")


@pytest.mark.parametrize("kind", ["dinov2_reg", "eva02", "beit", "classifier"])
def test_architectures_without_such_a_tower_are_refused_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither of transformers' CLIPVisionModel.*vit_\*_siglip_\*.*--to timm"):
        write_hf_export(student(kind), tmp_path / "out", softcap=None, card={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["clip_quickgelu", "siglip"])
def test_a_clip_with_other_blocks_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither"):
        write_hf_export(student(kind, init_values=1e-5), tmp_path / "out", softcap=None, card={})


@torch.no_grad()
def test_the_cap_in_bf16_is_as_near_as_the_rest_of_the_tower(export: tuple[Any, Path, Any]) -> None:
    backbone, folder, _ = export
    tower_file = standalone("aligned_tower")
    trained = backbone(noise(backbone), softcap=CAP)

    def off(half: Any) -> float:
        features = tower_file.tower_features(half, noise(backbone).bfloat16()).float()
        return ((features - trained).norm() / trained.norm()).item()

    assert off(tower_file.load_tower(folder).bfloat16()) < 0.02  # measured 0.008; without the cap 0.28 to 0.35


def test_the_config_is_that_of_the_architecture(export: tuple[Any, Path, Any]) -> None:
    backbone, folder, _ = export
    config = json.loads((folder / "config.json").read_text())
    act = "quick_gelu" if "quickgelu" in backbone.name else "gelu"
    eps = 1e-6 if "siglip" in backbone.name else 1e-5
    assert (config["hidden_act"], config["layer_norm_eps"]) == (act, eps)
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (4, 64, 256)
    assert timm.__version__ in (folder / "README.md").read_text()
