"""The backbone that locfast brings: plain timm loads it, and it is as good as its config says."""

import json
from pathlib import Path

import pytest
import timm
import torch

import locfast
from locfast.data.scenes import CLASSES, SIZE
from locfast.demo.pretrain import evaluate, main, model_config, objects_at, rate_at
from locfast.models.backbone import load_backbone

TEACHER = Path(locfast.__file__).parent / "demo" / "teacher"


def test_plain_timm_loads_it_and_it_reaches_its_stated_recall():
    stated = json.loads((TEACHER / "config.json").read_text())["training"]["held_out"]
    model = timm.create_model(f"local-dir:{TEACHER}", pretrained=True).eval()
    measured = evaluate(model, torch.device("cpu"), scenes=512)
    # The first 512 of the same held-out scenes: a class has about 90 positives there, so recall is known to 0.01.
    assert measured["recall"] == pytest.approx(stated["recall"], abs=0.03)
    assert measured["precision"] == pytest.approx(stated["precision"], abs=0.03)
    assert stated["recall"] > 0.85 and stated["precision"] > 0.85


def test_it_is_small_and_names_its_classes():
    config = json.loads((TEACHER / "config.json").read_text())
    assert config["label_names"] == list(CLASSES[1:])
    assert (TEACHER / "model.safetensors").stat().st_size < 8_000_000


def test_locfast_loads_it_by_name():
    backbone = load_backbone("demo")
    assert backbone.image_size == (SIZE, SIZE) and backbone.num_prefix_tokens == 1
    plain = timm.create_model(f"local-dir:{TEACHER}", pretrained=True).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.allclose(backbone.eval().forward_features(images), plain.forward_features(images), atol=1e-4)


def test_pretraining_goes_on_after_a_kill_and_gives_the_same_weights(tmp_path, monkeypatch):
    small = ["--steps", "4", "--batch-size", "4", "--width", "32", "--depth", "1", "--device", "cpu"]
    monkeypatch.setattr("locfast.demo.pretrain.HELD_OUT", 8)
    monkeypatch.setattr("locfast.demo.pretrain.evaluate", lambda model, device: {"recall": 0.0, "precision": 0.0})
    main([*small, "--out", str(tmp_path / "whole")])

    class Killed(Exception):
        pass

    def dies(model, device):
        (calls := calls_made).append(1)
        if len(calls) == 2:
            raise Killed
        return {"recall": 0.0, "precision": 0.0}

    calls_made: list[int] = []
    monkeypatch.setattr("locfast.demo.pretrain.evaluate", dies)
    with pytest.raises(Killed):
        main([*small, "--save-every", "2", "--out", str(tmp_path / "cut")])
    main([*small, "--save-every", "2", "--out", str(tmp_path / "cut")])
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    assert not (tmp_path / "cut" / "state.pt").exists()


def test_curriculum_and_rate():
    assert [objects_at(f) for f in (0.0, 0.05, 0.15, 0.5)] == [1, 2, 3, 4]
    assert rate_at(0, 1000, 1.0) < 0.01 < rate_at(1000, 1000, 1.0) + 0.001
    assert rate_at(200, 1000, 1.0) > 0.8


def test_config_is_timms():
    config = model_config(96, 12)
    assert config["num_classes"] == len(CLASSES) - 1 == config["pretrained_cfg"]["num_classes"]
