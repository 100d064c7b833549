"""`python -m locfast.export` of CLOC runs: the prompter beside every tower that it can read, and both towers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from locfast.cli import parse_train
from locfast.engine.run import train
from locfast.engine.run_folder import load_method
from locfast.export import main
from locfast.models.exporters.folder import standalone
from locfast.models.prompter_file import load_box_head, load_prompter
from tests.eval.tiny_clip import CONFIGS
from tests.models.exporters.small import one_thread

__all__ = ["one_thread"]

open_clip = pytest.importorskip("open_clip")

SIZE = 64


def make_run(folder: Path, *flags: str) -> Path:
    """Two steps of CLOC on scenes."""
    config = {**CONFIGS["clip"], "vision_cfg": {**CONFIGS["clip"]["vision_cfg"], "image_size": SIZE}}
    (folder / "locfast-export.json").write_text(json.dumps(config))
    line = f"--method cloc --model open_clip --cloc.text {folder}/locfast-export.json --data demo --out {folder}/run"
    line += " --val none --steps 2 --batch-size 4 --workers 0 --device cpu --lr 1e-2 --cloc.optim.warmup-steps 1"
    train(parse_train([*line.split(), *flags]))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("trained"))


def export(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["locfast.export", *map(str, args)])
    main()


def prompter_module(folder: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location("exported_prompter", folder / "cloc_prompter.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["exported_prompter"] = module
    spec.loader.exec_module(module)
    return module


def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def boxes() -> torch.Tensor:
    return torch.tensor([[[0.1, 0.2, 0.5, 0.7], [0.0, 0.3, 1.0, 0.6]]] * 2)


@torch.no_grad()
def test_tower_and_prompter_from_files_alone_give_the_regions_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export(monkeypatch, run, "--out", out)
    assert f'from cloc_prompter import load; prompter = load("{out}")' in capsys.readouterr().out
    method: Any = load_method(run).eval()
    tokens = method.image.backbone(images())
    expected = method.prompter(tokens[:, 1:], boxes())
    tower = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    prompter = prompter_module(out).load(out)
    torch.testing.assert_close(prompter(tower.forward_features(images()), boxes()), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(prompter(tokens, boxes()), expected)
    own = load_prompter(out)
    assert own is not None and torch.equal(own(tokens[:, 1:], boxes()), expected)
    phrases = method.text(method.text.tokenize(["a red star", "a blue disc"]))[None].expand(2, -1, -1)
    asked = method.prompter.ask(tokens[:, 1:])
    found = [method.box_head(method.prompter.phrases(asked, phrase)) for phrase in phrases.unbind(1)]
    torch.testing.assert_close(prompter.grounded(tokens, phrases), torch.stack(found, 1), rtol=1e-6, atol=1e-6)
    assert load_box_head(out) is not None


def test_the_card_says_method_data_and_what_the_prompter_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(monkeypatch, run, "--out", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    config = json.loads((tmp_path / "out/prompter.json").read_text())
    for part in ("| method | cloc |", "| data | demo |", "## Prompter", "Images were padded", "text tower that was"):
        assert part in card, part
    method: Any = load_method(run)
    assert config["region_scale"] == pytest.approx(method.region_scale().item())
    assert (config["image_size"], config["padded"], config["box_head"]) == ([SIZE, SIZE], True, True)
    blocks = [part.removeprefix("python\n") for part in card.split("```")[1::2] if part.startswith("python\n")]
    (code,) = [block for block in blocks if "cloc_prompter" in block]
    from PIL import Image

    monkeypatch.syspath_prepend(tmp_path / "out")
    names: dict[str, Any] = {"image": Image.new("RGB", (120, 90), (9, 99, 9)), "patches": torch.randn(1, 16, 64)}
    exec(code.replace("FOLDER", str(tmp_path / "out")), names)
    sys.modules.pop("cloc_prompter")
    assert names["regions"].shape == (1, 1, 24) and names["pixels"].shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(
    "to, adapter", [("hf", ()), ("llava", ("--adapter", "mlp")), ("prismatic", ("--adapter", "mlp"))]
)
@torch.no_grad()
def test_targets_that_hand_on_the_last_tokens_have_the_prompter_beside_them(
    to: str, adapter: tuple[str, ...], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if to != "prismatic":
        pytest.importorskip("transformers")
    out = tmp_path / "out"
    export(monkeypatch, run, "--to", to, "--out", out, *adapter)
    makers: dict[str, Any] = {
        "hf": lambda: standalone("aligned_tower").AlignedTower(out),
        "llava": lambda: standalone("aligned_tower").AlignedTower(out),
        "prismatic": lambda: standalone("aligned_vit").AlignedViT("aligned", folder=out),
    }
    tokens = makers[to]()(images())
    assert tokens.shape[1] == (17 if to == "hf" else 16)
    method: Any = load_method(run).eval()
    expected = method.prompter(method.image.backbone(images())[:, 1:], boxes())
    torch.testing.assert_close(prompter_module(out).load(out)(tokens, boxes()), expected, rtol=1e-4, atol=1e-4)
    assert "What is left out" in (out / "README.md").read_text()


def test_an_adapter_that_takes_the_last_blocks_away_has_no_prompter_and_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = json.loads((run.parent / "locfast-export.json").read_text())
    deep["vision_cfg"]["layers"] = 3
    (tmp_path / "locfast-deep.json").write_text(json.dumps(deep))
    made = make_run(tmp_path, "--cloc.text", f"{tmp_path}/locfast-deep.json")
    export(monkeypatch, made, "--to", "prismatic", "--adapter", "truncated", "--out", tmp_path / "out")
    assert "no prompter: it reads the last block's tokens" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*prompter*"))


@torch.no_grad()
def test_open_clip_gets_both_trained_towers_and_the_temperature(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export(monkeypatch, run, "--to", "open_clip", "--out", out)
    assert f'open_clip.create_model_and_transforms("local-dir:{out}")' in capsys.readouterr().out
    method: Any = load_method(run).eval()
    model = open_clip.create_model_and_transforms(f"local-dir:{out}")[0].eval()
    trained = method.image.embed(method.image.backbone(images()))
    torch.testing.assert_close(model.encode_image(images()), trained, rtol=1e-4, atol=1e-5)
    tokens = method.text.tokenizer(["a striped star", "two discs"])  # as others call it, to the end of the context
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{out}")(["a striped star", "two discs"]), tokens)
    torch.testing.assert_close(model.encode_text(tokens), method.text(tokens), rtol=1e-6, atol=1e-6)
    assert model.logit_scale.exp().item() == pytest.approx(method.scale().item(), rel=1e-6)
    began: Any = open_clip.create_model(Path(run.parent / "locfast-export.json").stem)
    assert not torch.equal(began.encode_text(tokens), model.encode_text(tokens))


def test_an_export_over_that_of_a_run_with_a_prompter_leaves_no_stale_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_export_targets import make_run as make_maskembed

    (tmp_path / "plain").mkdir()
    other = make_maskembed(tmp_path / "plain", "clip_quickgelu")
    export(monkeypatch, run, "--out", tmp_path / "out")
    export(monkeypatch, other, "--out", tmp_path / "out", "--overwrite")
    assert load_prompter(tmp_path / "out") is None and not list((tmp_path / "out").glob("*prompter*"))


def test_the_baseline_and_a_run_without_grounding_and_padding_say_so_in_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path, "--cloc.prompter", "roi", "--cloc.no-grounding", "--cloc.crop", "center")
    export(monkeypatch, made, "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out/prompter.json").read_text())
    assert (config["kind"], config["box_head"], config["padded"]) == ("roi", False, False)
    assert load_box_head(tmp_path / "out") is None
    card = (tmp_path / "out/README.md").read_text()
    assert "RoI-align" in card and "without grounding" in card and "cropped and not padded" in card
