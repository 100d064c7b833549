"""`python -m locfast.analyze`: tables, a JSON, maps and a page, and one message for every mistake."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import save_for_hf

from locfast.analyze import main
from locfast.models.backbone import load_backbone
from locfast.report import write_report
from tests.eval.tiny_clip import TINY
from tests.report.pages import check_page


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["locfast.analyze", *map(str, words), "--device", "cpu"])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small models in timm's form: a CLIP tower on a grid of 2 x 2, and one with another seed, on 3 x 3."""
    found = []
    for seed, size in ((0, 32), (1, 48)):
        folder = tmp_path_factory.mktemp("models") / f"clip{seed}"
        model = load_backbone("vit_base_patch16_clip_224", False, image_size=size, seed=seed, **TINY).model
        save_for_hf(model, str(folder), model_args=model._model_args, safe_serialization=True)
        found.append(folder)
    return found


def test_models_side_by_side_in_json_maps_and_page(models, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    words = ("--model", *models, "--softcap", 5, "--data", "demo:12", "--images", 8, "--pictures", 2)
    assert call(monkeypatch, *words, "--query", "0,1", "1,1", "--out", out) == 0
    told: dict[str, Any] = json.loads((out / "analyze.json").read_text())
    names = [str(model) for model in models]
    assert list(told["models"]) == names and told["data"]["read"] == 8 and len(told["pictures"]) == 2
    assert told["settings"]["query"] == [[0, 1], [1, 1]] and told["settings"]["precision"] == "fp32"
    assert [told["models"][n]["queries"] for n in names] == [[1, 3], [2, 8]]  # the same places on 2 x 2 and 3 x 3
    assert all(told["models"][name]["softcap"] == 5 for name in names)
    depth, heads = TINY["depth"], TINY["num_heads"]
    for name in names:
        distance = told["found"]["models"][name]["distance"]
        by_head = np.array(distance["by_head"])
        assert by_head.shape == (depth, heads) and (by_head > 0).all() and (by_head < 2**0.5).all()
        np.testing.assert_allclose(distance["by_layer"], by_head.mean(1))
        assert list(told["found"]["models"][name]["spectrum"]) == [
            *(f"block {i + 1}" for i in range(depth)),
            "final norm",
        ]
    (difference,) = told["found"]["differences"]
    assert (difference["model"], difference["against"]) == (names[1], names[0])
    values = [told["found"]["models"][name]["spectrum"]["final norm"]["singular_values"] for name in names]
    np.testing.assert_allclose(difference["log10"]["final norm"], np.log10(values[1]) - np.log10(values[0]))
    with np.load(out / "maps.npz") as maps:
        assert maps["model0"].shape == (2, 2, heads, 2, 2) and maps["model1"].shape == (2, 2, heads, 3, 3)
    page = check_page((out / "report.html").read_text(encoding="utf-8"))
    assert page.texts["h2"] == [
        "Average attention distance",
        "Singular values of features",
        "Attention maps of the last block",
        "How it was measured",
    ]
    assert len(page.all("image")) == 2 * 2 * (1 + 2)  # a picture and two models, for every query
    shown = capsys.readouterr().out
    assert "average attention distance" in shown and "effective rank" in shown and "final norm" in shown
    before = (out / "report.html").read_bytes()
    assert write_report(out).read_bytes() == before


def test_the_same_command_gives_the_same_figures(models, tmp_path, monkeypatch) -> None:
    for out in ("a", "b"):
        assert call(monkeypatch, "--model", models[0], "--data", "demo:9", "--out", tmp_path / out) == 0
    first, again = (json.loads((tmp_path / out / "analyze.json").read_text()) for out in ("a", "b"))
    assert first["found"] == again["found"] and first["found"]["differences"] == []


def test_mistakes_end_with_one_message_and_exit_code_2(models, tmp_path, monkeypatch, capsys) -> None:
    model = ("--model", models[0], "--data", "demo:4")

    def told(*words: object) -> str:
        assert call(monkeypatch, *words) == 2
        shown = capsys.readouterr()
        assert shown.err.count("locfast: ") == 1 and "Traceback" not in shown.err and shown.out == ""
        return " ".join(shown.err.split())

    never = ("--out", tmp_path / "never")
    for query in ("2,0", "1", "a,b", "-1,0", "0,0,0"):
        assert "grid of 2 rows and 2 columns" in told(*model, f"--query={query}", *never)
    assert "--images 1: type at least 2" in told(*model, "--images", 1, *never)
    assert "given twice" in told("--model", models[0], models[0], "--data", "demo", *never)
    assert "found no such file" in told("--model", models[0], "--data", tmp_path / "gone", *never)
    assert "unknown model" in told("--model", "vit_bas_patch16_224", "--data", "demo", *never)
    assert not (tmp_path / "never" / "analyze.json").exists()


def test_nothing_is_overwritten_unasked(models, tmp_path, monkeypatch, capsys) -> None:
    words = ("--model", models[0], "--data", "demo:4", "--pictures", 1, "--out")
    assert call(monkeypatch, *words, tmp_path / "out") == 0
    before = (tmp_path / "out" / "analyze.json").read_bytes()
    assert call(monkeypatch, *words, tmp_path / "out", "--seed", 5) == 2
    assert "Add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "analyze.json").read_bytes() == before
    assert call(monkeypatch, *words, tmp_path / "out", "--seed", 5, "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "analyze.json").read_text())["settings"]["seed"] == 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert call(monkeypatch, *words, tmp_path / "mine", "--overwrite") == 2
    assert "holds no analyze.json but thesis.tex" in " ".join(capsys.readouterr().err.split())


@pytest.mark.gpu
def test_a_gpu_gives_the_figures_of_the_cpu(models, tmp_path, monkeypatch) -> None:
    words = ("--model", models[0], "--data", "demo:16", "--decoder", "cpu", "--pictures", 0)
    monkeypatch.setattr(sys, "argv", ["x", *map(str, (*words, "--out", tmp_path / "gpu", "--device", "cuda"))])
    main()
    assert call(monkeypatch, *words, "--out", tmp_path / "cpu") == 0
    gpu, cpu = (json.loads((tmp_path / out / "analyze.json").read_text())["found"] for out in ("gpu", "cpu"))
    one, two = (torch.tensor(found["models"][str(models[0])]["distance"]["by_head"]) for found in (gpu, cpu))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)  # fp32 products, in TF32 where a machine has that on
