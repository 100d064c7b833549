"""`python -m locfast.evaluate`: one table of aligned against original, and a message for every mistake."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import save_for_hf

from locfast.cli import parse_train
from locfast.data.sources import ClassFolder
from locfast.engine.run import train
from locfast.eval.global_ability.features import Reading, Tower, image_features
from locfast.eval.global_ability.pooling import pick_pool, pooled
from locfast.evaluate import main
from locfast.models.backbone import load_backbone
from locfast.models.joint import has_cls
from tests.eval.tiny_clip import CONFIGS, TINY

HUES = {"ash": (90, 90, 90), "leaf": (40, 150, 60), "sky": (70, 120, 210)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take ten times as long when two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def jpeg(hue: tuple[int, int, int], rng: np.random.Generator) -> bytes:
    knots = np.clip(rng.normal(0, 60, (5, 6, 3)) + np.array(hue), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(knots).resize((60, 44), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def class_folders(root: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, hue in HUES.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:02}.jpg").write_bytes(jpeg(hue, rng))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Photograph-like JPEGs of three classes; one of the validation files is damaged."""
    root = tmp_path_factory.mktemp("classes")
    train_root, val = class_folders(root / "train", 12, 0), class_folders(root / "val", 9, 1)
    (val / "leaf" / "04.jpg").write_bytes(b"<html>404</html>")
    return train_root, val


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP tower in timm's form."""
    folder = tmp_path_factory.mktemp("original") / "clip"
    model = load_backbone("vit_base_patch16_clip_224", False, image_size=32, seed=4, **TINY).model
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def run(original: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of MaskEmbed on the training folder, so fast that the backbone changes for sure."""
    out = tmp_path_factory.mktemp("runs") / "aligned"
    words = f"--model {original} --data {data[0]} --out {out} --steps 3 --batch-size 8 --lr 3e-3 --workers 0 --seed 5"
    return train(parse_train([*words.split(), "--val", "none", "--device", "cpu"]))


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["locfast.evaluate", *map(str, words), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluate.json").read_text())


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: tuple[Path, Path]) -> Callable[..., dict[str, Any]]:
    def done(name: str, *words: object, out: str = "out") -> dict[str, Any]:
        split = ["--val", data[1], *(["--train", data[0]] if name != "zero-shot" else [])]
        assert call(monkeypatch, name, *split, "--out", tmp_path / out, *words) == 0
        return result(tmp_path / out)

    return done


def refused(monkeypatch, capsys, *words: object) -> str:
    assert call(monkeypatch, *words) == 2
    told = capsys.readouterr()
    assert told.err.count("locfast: ") == 1 and "Traceback" not in told.err
    return " ".join(told.err.split())


def test_run_is_set_against_its_own_starting_model(evaluate, run: Path, original: Path, capsys) -> None:
    told = evaluate("knn", "--model", run, "--k", 3, 10)
    assert told["evaluation"] == "knn" and told["settings"]["k"] == [3, 10]
    names = [str(original), "aligned"]
    assert list(told["models"]) == names
    assert told["models"]["aligned"]["against"] == str(original) and told["models"]["aligned"]["softcap"] == 30
    assert told["models"][str(original)]["softcap"] is None
    assert [(one["setting"], one["model"]) for one in told["scores"]] == [
        (k, n) for k in ("k = 3", "k = 10") for n in names
    ]
    for before, after in zip(told["scores"][::2], told["scores"][1::2], strict=True):
        assert before["difference"] is None and after["difference"]["against"] == str(original)
        assert after["difference"]["accuracy"] == pytest.approx(after["accuracy"] - before["accuracy"])
        low, high = after["difference"]["interval"]
        assert low <= after["difference"]["accuracy"] <= high
        assert set(after["per_class"]) == set(HUES)
    assert told["versions"]["torch"] == torch.__version__.split("+")[0]
    shown = capsys.readouterr().out
    assert "difference from" in shown and "k = 10" in shown and "aligned" in shown


def test_unreadable_image_is_left_out_counted_and_named(evaluate, data, original: Path, capsys) -> None:
    """26 of 27 images are judged: nothing stands in for the damaged one."""
    told = evaluate("knn", "--model", original, "--k", 5)
    bad = str(data[1] / "leaf" / "04.jpg")
    val = told["data"]["val"]
    assert (val["images"], val["read"]) == (27, 26) and list(val["unreadable"]) == [bad]
    score = told["scores"][0]
    assert score["accuracy"] * 26 == pytest.approx(round(score["accuracy"] * 26))
    assert score["per_class"]["leaf"] * 8 == pytest.approx(round(score["per_class"]["leaf"] * 8))
    out, err = capsys.readouterr()
    assert f"cannot read {bad}" in err and "left out" in err and "another sample" not in err
    assert "1 of 27 val images could not be read" in out


def test_features_are_the_backbones_under_its_cap_whatever_the_batch(data, original: Path) -> None:
    backbone = load_backbone(str(original)).eval()
    for block in backbone.blocks:
        block.attn.qkv.weight.data *= 20  # random weights attend so evenly that no cap would matter
    source = ClassFolder(data[1])
    tower = {cap: Tower(backbone, cap, pooled(backbone, "cls+mean")) for cap in (None, 0.05)}
    read = image_features(
        source, {str(cap): one for cap, one in tower.items()}, Reading(torch.device("cpu"), batch_size=5)
    )
    assert source.name(13).endswith("leaf/04.jpg") and 13 not in read.index.tolist()
    assert read.labels.tolist() == [0] * 9 + [1] * 8 + [2] * 9
    whole = image_features(source, {"None": tower[None]}, Reading(torch.device("cpu"), batch_size=27, workers=2))
    # batches of other sizes are other matrix products: a few units in the last place
    torch.testing.assert_close(read.features["None"], whole.features["None"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(read.features["None"], read.features["0.05"], atol=1e-3)

    with Image.open(source.name(20)) as image:  # timm's own transform of the same file
        from timm.data import create_transform, resolve_data_config

        pixels = create_transform(**resolve_data_config({}, model=backbone.model))(image)[None]
    with torch.no_grad():
        tokens = backbone.model.forward_features(pixels)[0]
    place = read.index.tolist().index(20)
    # timm resizes and crops in two steps of 8 bits, the loader in one: under a level of 255, 0.02 after normalising
    expected = torch.cat([tokens[0], tokens[1:].mean(0)])
    assert (read.features["None"][place] - expected).norm() <= 0.05 * expected.norm()


def test_mean_stands_in_where_there_is_no_cls_token(evaluate, tmp_path: Path, monkeypatch, capsys, data) -> None:
    registers = load_backbone("vit_base_patch16_siglip_gap_224", False, image_size=32, **TINY)
    assert not has_cls(registers) and pick_pool(registers, None, "x") == "mean"
    folder = tmp_path / "siglip"
    save_for_hf(registers.model, str(folder), safe_serialization=True)
    told = evaluate("knn", "--model", folder, "--k", 3)
    assert told["settings"]["pools"] == {str(folder): "mean"}
    words = ("--train", data[0], "--val", data[1], "--out", tmp_path / "other")
    assert "has no CLS token" in refused(
        monkeypatch, capsys, "knn", "--model", folder, "--pool", "cls+mean", "--k", 3, *words
    )


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_same_seed_same_figures(evaluate, run: Path, solver: str) -> None:
    words = ("--model", run, "--solver", solver, *(("--l2", 0.01, 0.1) if solver == "lbfgs" else ()))
    first, again = (evaluate("linear", *words, "--seed", 3, out=out) for out in ("a", "b"))
    assert first["scores"] == again["scores"]
    aligned = first["scores"][1]
    assert aligned["accuracy"] > 0.6 and aligned["model"] == "aligned"  # colours of three classes: 1/3 by chance
    held_out = {one["value"]: one["accuracy"] for one in aligned["details"]["held_out"]}
    assert held_out[aligned["details"]["chosen"]] == max(held_out.values())


def test_linear_choice_does_not_follow_the_validation_split(
    evaluate, run: Path, data, tmp_path: Path, monkeypatch
) -> None:
    """The same training split with another validation split, whose classes are swapped, chooses the same."""
    swapped = tmp_path / "swapped"
    shutil.copytree(data[1], swapped)
    for old, new in (("ash", "x"), ("sky", "ash"), ("x", "sky")):
        (swapped / old).rename(swapped / new)
    words = ("--model", run, "--l2", 1e-3, 0.1, 10.0)
    told = evaluate("linear", *words)
    assert call(monkeypatch, "linear", *words, "--train", data[0], "--val", swapped, "--out", tmp_path / "s") == 0
    other = result(tmp_path / "s")
    for one, two in zip(told["scores"], other["scores"], strict=True):
        assert one["details"] == two["details"] and one["accuracy"] > two["accuracy"]


def test_zero_shot_of_a_run_says_what_to_expect(evaluate, run: Path, original: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("open_clip")
    config = tmp_path / "locfast-command.json"
    config.write_text(json.dumps(CONFIGS["clip"]))
    words = ("--text-model", config, "--text-pretrained", "none", "--templates", "simple")
    told = evaluate("zero-shot", "--model", run, *words)
    assert [one["model"] for one in told["scores"]] == [str(original), "aligned"]
    assert told["settings"]["names_of_classes"] == {name: name for name in HUES}
    assert len(told["settings"]["prompts"]) == 7
    shown = " ".join(capsys.readouterr().out.split())
    assert "Expected: alignment does not train the path from the CLS token" in shown
    assert "is not the image tower of locfast-command" in shown  # random weights of another seed


def test_several_models_and_one_to_set_them_against(evaluate, run: Path, original: Path) -> None:
    told = evaluate("knn", "--model", run, "demo", "--against", original, "--k", 5)
    assert {name: one["against"] for name, one in told["models"].items()} == {
        str(original): None,
        "aligned": str(original),
        "demo": str(original),
    }
    alone = evaluate("knn", "--model", run, "--against", "none", "--k", 5, out="alone")
    assert [one["difference"] for one in alone["scores"]] == [None]
    assert alone["scores"][0]["accuracy"] == told["scores"][1]["accuracy"]


def test_results_are_not_overwritten_unasked(
    evaluate, original: Path, data, tmp_path: Path, monkeypatch, capsys
) -> None:
    words = ("--model", original, "--k", 3)
    evaluate("knn", *words)
    again = ("knn", *words, "--train", data[0], "--val", data[1], "--out")
    before = (tmp_path / "out" / "evaluate.json").read_bytes()
    assert "Add --overwrite" in refused(monkeypatch, capsys, *again, tmp_path / "out")
    assert (tmp_path / "out" / "evaluate.json").read_bytes() == before
    assert evaluate("knn", "--model", original, "--k", 4, "--overwrite")["settings"]["k"] == [4]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    told = refused(monkeypatch, capsys, *again, tmp_path / "mine", "--overwrite")
    assert "holds no evaluate.json but thesis.tex" in told


def test_mistakes_end_with_one_message_and_exit_code_2(data, original, run, tmp_path, monkeypatch, capsys) -> None:
    train_root, val = data
    one, other, bare = tmp_path / "one", class_folders(tmp_path / "other", 1, 0), tmp_path / "bare"
    shutil.copytree(val / "sky", one / "sky")
    (other / "sky").rename(other / "sea")
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare)
    base = ["--out", tmp_path / "never"]

    def told(*words: object) -> str:
        return refused(monkeypatch, capsys, *words, *base)

    pair = ("--train", train_root, "--val", val)
    assert "did you mean 'train'" in told("knn", "--model", original, "--train", f"{train_root}n", "--val", val)
    assert "one sub-folder sky" in told("knn", "--model", original, "--train", one, "--val", val)
    differ = told("knn", "--model", original, "--train", train_root, "--val", other)
    assert f"only in {train_root}: sky (1); only in {other}: sea (1)" in differ
    assert "--k 100" in told("knn", "--model", original, *pair, "--k", 5, 100)
    assert "--k 100 200" in told("knn", "--model", original, *pair)  # the defaults, of 36 images
    assert "has no complete checkpoint" in told("knn", "--model", bare, *pair, "--k", 3)
    assert "given twice" in told("knn", "--model", original, original, *pair, "--k", 3)
    assert "is a run" in told("knn", "--model", run, "--softcap", 30, *pair, "--k", 3)
    assert "--l2 must be positive" in told("linear", "--model", original, *pair, "--l2", 0.1, -1)
    assert "--temperature 0" in told("knn", "--model", original, *pair, "--k", 3, "--temperature", 0)
    assert "did you mean 'linear'" in refused(monkeypatch, capsys, "liner", "--model", original)


def test_class_of_which_nothing_can_be_read_is_told(data, original: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    val = tmp_path / "val"
    shutil.copytree(data[1], val)
    for file in (val / "sky").iterdir():
        file.write_bytes(b"")
    words = ("knn", "--model", original, "--k", 3, "--train", data[0], "--val", val, "--out", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["locfast.evaluate", *map(str, words), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "no image of the class sky" in capsys.readouterr().err


def test_real_photographs_pass_through(shared: Path, original: Path, tmp_path: Path, monkeypatch) -> None:
    photos = sorted((shared / "data" / "photos").rglob("*.jpg"))[:12]
    if len(photos) < 12:
        pytest.skip("no photographs beside the checkout")
    for place, photo in enumerate(photos):
        folder = tmp_path / "photos" / ("a", "b")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder)
    both = ("--train", tmp_path / "photos", "--val", tmp_path / "photos")
    assert call(monkeypatch, "knn", "--model", original, *both, "--k", 1, "--out", tmp_path / "out") == 0
    assert result(tmp_path / "out")["scores"][0]["accuracy"] == 1.0  # every image finds itself first
