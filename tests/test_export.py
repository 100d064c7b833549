"""Exports: plain timm loads them, they compute what was trained, and their card says what they are."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

from locfast.cli import parse_train
from locfast.engine.run import train
from locfast.export import main
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.export import write_timm_export
from locfast.models.model_card import describe_run
from locfast.models.softcap import set_softcap
from locfast.models.student import make_student

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 64, "num_heads": 4}
KINDS = {
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", {**SMALL, "img_size": 64}),
    "siglip": ("vit_base_patch16_siglip_224.webli", {**SMALL, "img_size": 64}),
    "dinov2_reg": ("vit_base_patch14_reg4_dinov2.lvd142m", {**SMALL, "img_size": 56}),
    "eva02": ("eva02_base_patch16_clip_224.merged2b", {**SMALL, "img_size": 64}),
    "beit": ("beit_base_patch16_224.in22k_ft_in22k_in1k", {**SMALL, "img_size": 64}),
}


def student(kind: str) -> Backbone:
    """An untrained student, its weights stirred so that LayerScale, biases and norms count."""
    name, args = KINDS[kind]
    backbone = make_student(load_backbone(name, pretrained=False, **args), new_norm=True, new_last_block=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return backbone.eval()


def noise(backbone: Backbone) -> torch.Tensor:
    return torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


def run_export(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["locfast.export", *map(str, args)])
    main()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of MaskEmbed on eight images, with a moving average."""
    folder = tmp_path_factory.mktemp("trained")
    save_for_hf(student("siglip").model, str(folder / "teacher"), safe_serialization=True)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for index in range(8):
        pixels = random.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    flags = f"--model {folder}/teacher --data {folder}/images --out {folder}/run --val none --steps 2 --batch-size 4"
    train(parse_train([*flags.split(), "--workers", "0", "--ema", "0.5", "--lr", "1e-2", "--device", "cpu"]))
    return folder / "run"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_untrained_student_exported_loads_in_plain_timm_bit_by_bit_and_gives_the_same_features(
    kind: str, tmp_path: Path
) -> None:
    backbone = student(kind)
    write_timm_export(backbone, tmp_path / "out", softcap=None, card={})
    name, args = KINDS[kind]
    file = {"file": str(tmp_path / "out" / "model.safetensors"), "custom_load": False}
    if kind == "beit":
        args = {**args, "global_pool": ""}  # the final norm that training gave it stands before the pooling
    models = [
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True),
        timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=file, **args),
    ]
    images = noise(backbone)
    expected = backbone(images)
    trained = {key: value for key, value in backbone.model.state_dict().items() if not key.startswith("fc_norm.")}
    for model in models:
        loaded = {key: value for key, value in model.state_dict().items() if not key.startswith("fc_norm.")}
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[key], trained[key]) for key in trained)
        torch.testing.assert_close(model.eval().forward_features(images), expected, rtol=1e-5, atol=1e-5)
        assert tuple(model.pretrained_cfg["mean"]) == tuple(backbone.mean)


@torch.no_grad()
def test_the_one_line_of_the_card_puts_the_cap_back_and_the_card_has_the_measured_difference(tmp_path: Path) -> None:
    backbone = student("clip")
    images = noise(backbone)
    off = write_timm_export(backbone, tmp_path / "out", softcap=0.5, card={}, images=images)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    capped = backbone(images, softcap=0.5)
    plain = model.forward_features(images)
    assert off == pytest.approx(((plain - capped).norm() / capped.norm()).item(), rel=1e-3)
    assert off > 1e-3
    torch.testing.assert_close(set_softcap(model, 0.5).forward_features(images), capped)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model = set_softcap(model, 0.5)" in card
    assert f"relative L2 of {off:.2e}, measured on 2 images of the run" in card


@torch.no_grad()
def test_the_loading_lines_of_the_card_run_as_they_stand(tmp_path: Path) -> None:
    backbone = student("eva02")
    write_timm_export(backbone, tmp_path / "out", softcap=None, card={})
    card = (tmp_path / "out" / "README.md").read_text().replace("FOLDER", str(tmp_path / "out"))
    code = "".join(part.removeprefix("python\n") for part in card.split("```")[1::2] if part.startswith("python\n"))
    names: dict[str, Any] = {"image": Image.new("RGB", (90, 70), (200, 30, 90))}
    exec(code, names)
    assert names["features"].shape == (1, 17, 64)
    assert names["patches"].shape == (1, 16, 64)
    images = noise(backbone)
    torch.testing.assert_close(names["model"].eval().forward_features(images), backbone(images), rtol=1e-5, atol=1e-5)


def test_the_current_folder_can_be_exported_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_timm_export(student("clip"), Path("."), softcap=None, card={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_an_export_loads_again_as_a_backbone_and_can_be_exported_again(tmp_path: Path) -> None:
    backbone = student("beit")
    write_timm_export(backbone, tmp_path / "first", softcap=None, card={})
    again = load_backbone(str(tmp_path / "first")).eval()
    assert again.has_final_norm
    torch.testing.assert_close(again(noise(backbone)), backbone(noise(backbone)), rtol=1e-5, atol=1e-5)
    write_timm_export(again, tmp_path / "second", softcap=None, card={})
    assert (tmp_path / "first/model.safetensors").read_bytes() == (tmp_path / "second/model.safetensors").read_bytes()


def test_the_card_names_base_method_data_steps_metrics_config_versions_and_licence(tmp_path: Path) -> None:
    config = {"method": "maskembed", "data": "photos/", "lr": 3e-4, "recipe": "clip_b16"}
    metrics = [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.5, "val/loss": 0.6}, {"step": 3, "loss": 0.4}]
    card = describe_run(config, metrics, step=2, averaged=True)
    write_timm_export(student("clip"), tmp_path / "out", softcap=None, card=card)
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "| base model | vit_base_patch16_clip_quickgelu_224.openai |",
        "| method | maskembed |",
        "| data | photos/ |",
        "| steps | 2 |",
        "| weights | exponential moving average |",
        "| loss | 0.5 |",
        "| val/loss | 0.6 |",
        "lr: 0.0003",
        f"| timm | {timm.__version__} |",
        "timm states `apache-2.0`",
    ):
        assert part in text, part


def test_weights_from_a_file_of_unknown_origin_claim_no_licence_and_no_base_model(tmp_path: Path) -> None:
    tiny = load_backbone("vit_tiny_patch16_224", pretrained=False, depth=1)
    save_for_hf(tiny.model, str(tmp_path / "saved"), safe_serialization=True)
    backbone = load_backbone(f"vit_tiny_patch16_224@{tmp_path / 'saved/model.safetensors'}", depth=1)
    write_timm_export(backbone, tmp_path / "out", softcap=None, card={})
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:" not in text
    assert "license:" not in text
    assert "look where they came from" in text
    assert "license" not in json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]


def test_a_model_that_does_not_compute_what_was_trained_is_not_written(tmp_path: Path) -> None:
    backbone = student("clip")
    backbone.model.norm.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(RuntimeError, match="does not compute"):
        write_timm_export(backbone, tmp_path / "out", softcap=None, card={})
    assert not (tmp_path / "out").exists()


def test_an_export_leaves_generator_mode_and_weights_as_they_were(tmp_path: Path) -> None:
    backbone = student("clip").train()
    before, state = torch.get_rng_state(), {key: value.clone() for key, value in backbone.state_dict().items()}
    write_timm_export(backbone, tmp_path / "out", softcap=3.0, card={})
    assert torch.equal(torch.get_rng_state(), before)
    assert backbone.training
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@torch.no_grad()
def test_the_command_exports_the_average_or_the_weights_of_the_newest_checkpoint(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = {}
    for flag, file in (("--ema", "ema"), ("--no-ema", "model")):
        run_export(monkeypatch, run, "--to", "timm", "--out", tmp_path / file, flag)
        exported[file] = load_file(tmp_path / file / "model.safetensors")
        saved = load_file(run / "checkpoints/step-00000002" / f"{file}.safetensors")
        trained = [key for key in exported[file] if f"encoder.model.{key}" in saved]
        assert {"norm.weight", "pos_embed", "blocks.2.attn.qkv.weight"} <= set(trained)
        assert all(torch.equal(saved[f"encoder.model.{key}"], exported[file][key]) for key in trained)
    assert not torch.equal(exported["ema"]["norm.weight"], exported["model"]["norm.weight"])
    assert "step 2 (moving average)" in capsys.readouterr().out
    text = (tmp_path / "ema/README.md").read_text()
    assert "measured on 8 images of the run" in text
    assert "| weights | exponential moving average |" in text
    assert "softcap: 30.0" in text


def test_the_command_writes_into_the_run_and_overwrites_only_when_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_export(monkeypatch, run, "--overwrite")
    assert timm.create_model(f"local-dir:{run / 'exported'}", pretrained=True).num_features == 64
    with pytest.raises(SystemExit) as stop:
        run_export(monkeypatch, run)
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    run_export(monkeypatch, run, "--overwrite")


def test_a_folder_that_is_no_run_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, told in ((tmp_path / "nowhere", "there is no such folder"), (tmp_path, "is not a run folder")):
        with pytest.raises(SystemExit) as stop:
            run_export(monkeypatch, folder)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err


def test_help_does_not_import_torch() -> None:
    code = "import sys, locfast.export as e; e._parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
