"""Models by name, folder and file; and what a user is told when there is none."""

import json
import logging
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from model_families import images, small
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from locfast.errors import UserError
from locfast.models import create
from locfast.models.backbone import Backbone, load_backbone

NAME = "vit_tiny_patch16_224"


class Unpicklable:
    """A class of ours: unpickling it would run code."""


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return load_backbone(NAME, pretrained=False, seed=5, depth=2)


@pytest.fixture
def folder(tiny: Backbone, tmp_path: Path) -> Path:
    save_for_hf(tiny.model, str(tmp_path / "saved"), safe_serialization=True)
    return tmp_path / "saved"


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return backbone.model.state_dict()


def assert_same_weights(first: Backbone, second: Backbone) -> None:
    assert weights(first).keys() == weights(second).keys()
    assert all(torch.equal(tensor, weights(second)[key]) for key, tensor in weights(first).items())


def file_of(tiny: Backbone, path: Path, **extra: torch.Tensor) -> Path:
    save_file({**{k: v.clone() for k, v in weights(tiny).items()}, **extra}, path)
    return path


def test_a_local_folder_gives_its_model_with_its_weights(tiny: Backbone, folder: Path) -> None:
    loaded = load_backbone(str(folder))
    assert loaded.depth == 2
    assert_same_weights(loaded, tiny)
    assert_same_weights(load_backbone(f"local-dir:{folder}"), tiny)


def test_a_local_folder_without_pretrained_gives_seeded_weights(tiny: Backbone, folder: Path) -> None:
    fresh = load_backbone(str(folder), pretrained=False, seed=5)
    assert_same_weights(fresh, load_backbone(NAME, pretrained=False, seed=5, depth=2))


def test_demo_is_the_folder_that_locfast_brings(folder: Path, tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "DEMO_TEACHER", folder)
    assert_same_weights(load_backbone("demo"), tiny)


def test_a_classifier_head_in_a_folder_or_file_is_left_out(folder: Path, tiny: Backbone) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": 10}))
    file_of(tiny, folder / "model.safetensors", **{"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)})
    assert_same_weights(load_backbone(str(folder)), tiny)
    assert_same_weights(load_backbone(f"{NAME}@{folder / 'model.safetensors'}", depth=2), tiny)


def test_a_checkpoint_file_is_loaded_into_the_named_architecture(tiny: Backbone, tmp_path: Path) -> None:
    assert_same_weights(load_backbone(f"{NAME}@{file_of(tiny, tmp_path / 'w.safetensors')}", depth=2), tiny)
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights(tiny).items()}, "epoch": 3}, tmp_path / "w.pth.tar")
    assert_same_weights(load_backbone(f"{NAME}@{tmp_path / 'w.pth.tar'}", depth=2), tiny)


def test_a_moco_v3_file_gives_its_base_encoder_and_imagenet_statistics(tiny: Backbone, tmp_path: Path) -> None:
    state = {f"module.base_encoder.{k}": v for k, v in weights(tiny).items()}
    state |= {f"module.momentum_encoder.{k}": torch.zeros_like(v) for k, v in weights(tiny).items()}
    state |= {"module.base_encoder.head.0.weight": torch.zeros(8, 192), "module.predictor.0.weight": torch.zeros(8, 8)}
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {}}, tmp_path / "moco.pth.tar")
    loaded = load_backbone(f"{NAME}@{tmp_path / 'moco.pth.tar'}", depth=2)
    assert_same_weights(loaded, tiny)
    assert loaded.mean == (0.485, 0.456, 0.406)
    assert tiny.mean == (0.5, 0.5, 0.5)


def test_an_openclip_file_gives_its_image_tower(tmp_path: Path) -> None:
    eva = small("eva02", depth=2)
    state = {f"visual.{k}": v.clone() for k, v in weights(eva).items()}
    state |= {"text.token_embedding.weight": torch.zeros(10, 4), "logit_scale": torch.zeros(1)}
    save_file(state, tmp_path / "eva_clip.safetensors")
    args = {"depth": 2, "img_size": 64, "embed_dim": 64, "num_heads": 4}
    name = f"eva02_base_patch16_clip_224@{tmp_path / 'eva_clip.safetensors'}"
    assert_same_weights(load_backbone(name, **args), eva)


def test_positions_are_resampled_to_another_image_size(tmp_path: Path) -> None:
    """DINOv2 comes for 518 px and is aligned at 224 px; its class and register tokens have no position in timm."""
    args = {"depth": 1, "embed_dim": 64, "num_heads": 4}
    name = "vit_base_patch14_reg4_dinov2"
    large = load_backbone(name, pretrained=False, **args)
    assert large.grid == (37, 37)
    resized = load_backbone(f"{name}@{file_of(large, tmp_path / 'w.safetensors')}", image_size=224, **args)
    assert resized.grid == (16, 16)
    assert resized.image_size == (224, 224)
    expected = timm.layers.resample_abs_pos_embed(large.model.pos_embed, (16, 16), (37, 37), num_prefix_tokens=0)
    torch.testing.assert_close(resized.model.pos_embed, expected)
    large.model.set_input_size((224, 224))
    torch.testing.assert_close(large.model.forward_features(images(resized)), resized(images(resized)))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vit_bas_patch16_224", "did you mean 'vit_base_patch16_224'"),
        ("vit_base_patch16_clip_224.opnai", "did you mean 'vit_base_patch16_clip_224.openai'"),
        ("org/model", "hub models are written hf-hub:org/name"),
        ("resnet50", "not plain Vision Transformers"),
        ("vit_base_r50_s16_224", "not plain Vision Transformers"),
        ("vit_base_patch16_224@/no/such/file.pth", "does not exist"),
        ("local-dir:/no/such/folder", "does not exist"),
        ("vit_nope@/no/such/file.pth", "unknown model 'vit_nope'"),
    ],
)
def test_a_name_that_leads_nowhere_is_told_with_what_to_type(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_backbone(name)


def test_a_checkpoint_of_another_architecture_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    file = file_of(tiny, tmp_path / "w.safetensors")
    with pytest.raises(
        UserError, match=r"another model than vit_small_patch16_224.*\[1, 1, 192\] there and \[1, 1, 384\]"
    ):
        load_backbone(f"vit_small_patch16_224@{file}", depth=2)
    with pytest.raises(UserError, match=r"of the model's .* tensors are not in it, first blocks\.2"):
        load_backbone(f"{NAME}@{file}", depth=3)
    with pytest.raises(UserError, match=r"it has blocks\.1"):
        load_backbone(f"{NAME}@{file}", depth=1)
    with pytest.raises(UserError, match="another model than beit_base_patch16_224"):
        load_backbone(f"beit_base_patch16_224@{file}", depth=2)


def test_a_torn_file_and_pickled_objects_are_refused(tiny: Backbone, tmp_path: Path) -> None:
    file = file_of(tiny, tmp_path / "w.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    torch.save({"state_dict": weights(tiny), "args": Unpicklable()}, tmp_path / "w.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="torn"):
        load_backbone(f"{NAME}@{file}", depth=2)
    with pytest.raises(UserError, match="pickled Python objects, which are never run"):
        load_backbone(f"{NAME}@{tmp_path / 'w.pth'}", depth=2)
    with pytest.raises(UserError, match="holds no tensors"):
        load_backbone(f"{NAME}@{tmp_path / 'empty.pth'}", depth=2)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": [1]}, {"model": None}, {1: torch.zeros(2)}], ids=str)
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        load_backbone(f"{NAME}@{tmp_path / 'w.pth'}", depth=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_half_precision_become_fp32(dtype: torch.dtype, tiny: Backbone, tmp_path: Path) -> None:
    torch.save({key: tensor.to(dtype) for key, tensor in weights(tiny).items()}, tmp_path / "w.pth")
    found = weights(load_backbone(f"{NAME}@{tmp_path / 'w.pth'}", depth=2))
    assert all(torch.equal(found[key], tensor.to(dtype).float()) for key, tensor in weights(tiny).items())


def test_a_folder_without_config_or_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_backbone(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a timm model config"):
        load_backbone(str(folder))
    (folder / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "hidden_size": 192}')
    with pytest.raises(UserError, match="cannot build what .*hidden_size"):
        load_backbone(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_backbone(str(folder))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "hf-hub:timm/no-such-model"])
def test_without_a_network_a_model_that_is_not_in_the_cache_is_told_so(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be fetched.*--no-pretrained"):
        load_backbone(name)


def test_quickgelu_weights_under_a_gelu_name_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="locfast"):
        load_backbone("vit_base_patch16_clip_quickgelu_224.openai", pretrained=False, depth=1)
        assert not caplog.records
        load_backbone("vit_base_patch16_clip_224.openai", pretrained=False, depth=1)
    assert "you may want vit_base_patch16_clip_quickgelu_224.openai" in caplog.text


def test_a_weights_file_by_another_name_is_found(folder: Path, tiny: Backbone) -> None:
    shutil.move(folder / "model.safetensors", folder / "aligned.safetensors")
    assert_same_weights(load_backbone(str(folder)), tiny)
    assert set(load_file(folder / "aligned.safetensors")) == set(weights(tiny))
