"""`python -m locfast.evaluate retrieval` and `zero-shot`: which text tower, and which way into its joint space."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from locfast.cli import parse_train
from locfast.engine.run import train
from locfast.eval.global_ability.text_tower import TextTower, open_text_tower, tuned_text_tower
from locfast.methods.maskembed import MaskEmbed
from locfast.models.backbone import load_backbone
from tests.eval.tiny_clip import CONFIGS, TINY
from tests.test_evaluate_command import call, class_folders, jpeg, refused, result

open_clip = pytest.importorskip("open_clip")

COUNT = 14


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with one to three captions; one has none, and one cannot be read."""
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = []
    for i in range(COUNT):
        (root / f"{i:02}.jpg").write_bytes(jpeg(tuple(rng.integers(0, 256, 3)), rng))
        lines.append({"image": f"{i:02}.jpg", "text": [f"picture {i} of {j} dogs" for j in range(1 + i % 3)]})
    lines[4]["text"] = []
    (root / "09.jpg").write_bytes(b"")
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "pairs.jsonl"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of open_clip; its random weights of seed 0 are the "teacher" of the runs below."""
    file = tmp_path_factory.mktemp("configs") / "locfast-text.json"
    file.write_text(json.dumps(CONFIGS["clip"]))
    return file


def start(folder: Path, name: str) -> Path:
    save_for_hf(load_backbone(name, False, image_size=32, seed=4, **TINY).model, str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def run_of(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of three steps that started from a small backbone of a timm family."""
    made: dict[str, Path] = {}

    def make(name: str = "vit_base_patch16_clip_224") -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp("runs")
            words = f"--model {start(root / 'original', name)} --data {pairs} --out {root / 'aligned'} --steps 3"
            words += " --batch-size 4 --lr 3e-3 --workers 0 --seed 5 --val none --device cpu --max-bad 0.2"
            made[name] = train(parse_train(words.split()))
        return made[name]

    return make


class Project(nn.Module):
    """The CLS token times a matrix [C, E]."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] @ self.matrix


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have every run hold more than its backbone, as a method that trains for a joint space leaves it."""
    plain = MaskEmbed.artifacts

    def also(**more: Any) -> None:
        monkeypatch.setattr(MaskEmbed, "artifacts", lambda self: {**plain(self), **more})

    return also


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: Path) -> Callable[..., dict[str, Any]]:
    def done(*words: object, out: str = "out") -> dict[str, Any]:
        assert call(monkeypatch, "retrieval", "--val", pairs, "--out", tmp_path / out, *words) == 0
        return result(tmp_path / out)

    return done


def told(found: dict[str, Any], model: str) -> list[float]:
    return [one["accuracy"] for one in found["scores"] if one["model"] == model]


def test_a_run_is_set_against_its_start_in_both_directions(evaluate, run_of, config, pairs, capsys) -> None:
    run = run_of()
    found = evaluate("--model", run, "--text-model", config, "--text-pretrained", "none")
    names = [str(run.parent / "original"), "aligned"]
    assert found["evaluation"] == "retrieval" and list(found["models"]) == names
    assert [(one["setting"], one["model"]) for one in found["scores"]] == [
        (f"{way}, R@{k}", name) for way in ("image to text", "text to image") for k in (1, 5, 10) for name in names
    ]
    for old, new in zip(found["scores"][::2], found["scores"][1::2], strict=True):
        assert new["difference"]["accuracy"] == pytest.approx(new["accuracy"] - old["accuracy"])
        low, high = new["interval"]
        assert low <= new["accuracy"] <= high
    captions = sum(1 + i % 3 for i in range(COUNT) if i not in (4, 9))
    assert found["settings"]["queries"] == {"images": COUNT - 2, "captions": captions}
    val = found["data"]["val"]
    assert (val["images"], val["read"]) == (COUNT, COUNT - 2)
    assert val["unreadable"][str(pairs.parent / "04.jpg")] == "it has no text"
    assert set(val["unreadable"]) == {str(pairs.parent / name) for name in ("04.jpg", "09.jpg")}
    out, err = capsys.readouterr()
    shown = " ".join(out.split())
    assert "recall in percent" in shown and "2 of 14 val images could not be read" in shown
    assert "an aligned backbone loses retrieval" in shown and "a tie counts against" in shown
    assert "it has no text" in err and "left out" in err


@torch.no_grad()
def test_figures_are_those_of_open_clips_own_encoders(evaluate, config, pairs, tmp_path) -> None:
    """The image tower itself as a timm folder: its features and open_clip's, images read by timm's transform."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    tower = open_text_tower(str(config), "none", seed=0).model
    model = load_backbone("vit_base_patch16_clip_224", False, image_size=32, **TINY).model
    model.load_state_dict(checkpoint_filter_fn(dict(tower.state_dict()), model), strict=False)  # but the projection
    save_for_hf(model, str(tmp_path / "image-tower"), safe_serialization=True)
    found = evaluate("--model", tmp_path / "image-tower", "--text-model", config, "--text-pretrained", "none")
    assert not any("is not the image tower" in note for note in found["notes"])

    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines = [line for i, line in enumerate(lines) if i not in (4, 9)]
    saved = load_backbone(str(tmp_path / "image-tower")).model
    transform = create_transform(**resolve_data_config({}, model=saved))
    pixels = torch.stack([transform(Image.open(pairs.parent / line["image"]).convert("RGB")) for line in lines])
    image_of = torch.tensor([i for i, line in enumerate(lines) for _ in line["text"]])
    tokens = open_clip.get_tokenizer("locfast-text")([text for line in lines for text in line["text"]])
    cosine = tower.encode_image(pixels, normalize=True) @ tower.encode_text(tokens, normalize=True).T
    expected = []
    for k in (1, 5, 10):
        best = cosine.topk(k, dim=1).indices
        expected.append((image_of[best] == torch.arange(len(lines))[:, None]).any(1).double().mean().item())
    for k in (1, 5, 10):
        best = cosine.T.topk(k, dim=1).indices
        expected.append((best == image_of[:, None]).any(1).double().mean().item())
    assert told(found, str(tmp_path / "image-tower")) == pytest.approx(expected)
    assert expected[0] < expected[1] < 1  # random towers: something is found and something missed


def test_a_folder_and_shards_with_texts_give_the_figures_of_their_list(
    evaluate, run_of, config, pairs, tmp_path, monkeypatch
) -> None:
    import tarfile

    folder, lines = tmp_path / "folder", [json.loads(line) for line in pairs.read_text().splitlines()]
    folder.mkdir()
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for line in lines:
            image = folder / line["image"]
            image.write_bytes((pairs.parent / line["image"]).read_bytes())
            tar.add(image, image.name)
            if line["text"]:
                image.with_suffix(".txt").write_text("\n".join(line["text"]))
                tar.add(image.with_suffix(".txt"), image.with_suffix(".txt").name)
    words = ("--model", run_of(), "--against", "none", "--text-model", config, "--text-pretrained", "none")
    expected = evaluate(*words)
    for place, source in enumerate((folder, tmp_path / "pairs.tar")):
        out = tmp_path / str(place)
        assert call(monkeypatch, "retrieval", "--val", source, "--out", out, *words) == 0
        assert result(out)["scores"] == expected["scores"]
        assert result(out)["settings"]["queries"] == expected["settings"]["queries"]


def test_captions_and_template_choose_what_is_read(evaluate, run_of, config, monkeypatch) -> None:
    read: list[str] = []
    encode = TextTower.encode
    monkeypatch.setattr(
        TextTower, "encode", lambda self, texts, *rest: read.extend(texts) or encode(self, texts, *rest)
    )
    words = ("--model", run_of(), "--against", "none", "--text-model", config, "--text-pretrained", "none")
    found = evaluate(*words, "--captions", 1, "--template", "a photo: {}")
    assert found["settings"]["queries"]["captions"] == COUNT - 2 == len(read)
    assert read[:2] == ["a photo: picture 0 of 0 dogs", "a photo: picture 1 of 0 dogs"]


def test_a_run_that_trained_its_way_into_the_joint_space_takes_that(evaluate, run_of, config, holds) -> None:
    run = run_of()
    tower = open_text_tower(str(config), "none", seed=0).model
    flags = ("--text-model", config, "--text-pretrained", "none")
    plain = evaluate("--model", run, *flags, out="plain")
    named = {"model": str(config), "pretrained": "none"}
    holds(embed=Project(tower.visual.proj.data), text=named)
    same = evaluate("--model", run, out="same")  # the very matrix of the tower, which the run names itself
    assert same["scores"] == plain["scores"]
    assert same["settings"]["text_towers"]["aligned"] == named
    assert not any("Expected" in note for note in same["notes"])
    holds(embed=Project(-tower.visual.proj.data), text=named)
    other = evaluate("--model", run, out="other")
    assert told(other, str(run.parent / "original")) == told(plain, str(run.parent / "original"))
    assert told(other, "aligned") != told(plain, "aligned")
    project = Project(tower.visual.proj.data)
    for place, embed in enumerate((project.forward, lambda tokens: tokens[:, 0] @ tower.visual.proj)):
        project.train()
        holds(embed=embed, text={"model": None, "pretrained": None})
        assert evaluate("--model", run, *flags, out=f"function-{place}")["scores"] == plain["scores"]
        assert not project.training or place  # a method's network is made ready for evaluation, too


def test_a_text_tower_that_a_run_trained_is_that_runs_alone(evaluate, run_of, config, holds) -> None:
    run = run_of()
    plain = evaluate("--model", run, "--text-model", config, "--text-pretrained", "none", out="plain")
    tower = open_text_tower(str(config), "none", seed=0).model
    project = Project(tower.visual.proj.data)
    generator = torch.Generator().manual_seed(1)
    for parameter in tower.transformer.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    holds(embed=project, text={"model": str(config), "pretrained": "none"}, text_tower=tower)
    tuned = evaluate("--model", run, out="tuned")
    assert told(tuned, "aligned") != told(plain, "aligned")
    assert told(tuned, str(run.parent / "original")) == told(plain, str(run.parent / "original"))
    assert tuned["settings"]["text_towers"]["aligned"]["pretrained"] == "trained by the run"
    assert tuned["settings"]["text_towers"][str(run.parent / "original")]["pretrained"] == "none"
    texts = ["picture 0 of 0 dogs"]
    assert (
        not tuned_text_tower(str(config), tower)
        .encode(texts)
        .allclose(open_text_tower(str(config), "none").encode(texts))
    )


def test_a_start_without_a_joint_space_is_left_out_where_its_run_has_one(
    evaluate, run_of, config, holds, monkeypatch, capsys, pairs, tmp_path
) -> None:
    run = run_of("vit_base_patch16_siglip_gap_224")  # no CLS token: no projection of CLIP's fits
    original = str(run.parent / "original")
    words = ("retrieval", "--val", pairs, "--out", tmp_path / "refused", "--model", run, "--overwrite")
    flags = ("--text-model", config, "--text-pretrained", "none")
    assert "works for CLIP with a CLS token" in refused(monkeypatch, capsys, *words, *flags)
    holds(embed=Project(torch.eye(64)[:, :24]), text={"model": str(config), "pretrained": "none"})
    found = evaluate("--model", run)
    assert list(found["models"]) == ["aligned"] and found["models"]["aligned"]["against"] is None
    assert {one["model"] for one in found["scores"]} == {"aligned"}
    assert any(note.startswith(f"{original}, from which the run started, is left out") for note in found["notes"])
    assert "works for CLIP with a CLS token" in refused(monkeypatch, capsys, *words, "--against", original)


def test_zero_shot_takes_them_too(run_of, config, holds, monkeypatch, tmp_path) -> None:
    run, val = run_of(), class_folders(tmp_path / "val", 6, 1)
    tower = open_text_tower(str(config), "none", seed=0).model
    words = ("zero-shot", "--model", run, "--val", val, "--templates", "simple", "--out")
    assert call(monkeypatch, *words, tmp_path / "a", "--text-model", config, "--text-pretrained", "none") == 0
    named = {"model": str(config), "pretrained": "none"}
    holds(embed=Project(tower.visual.proj.data), text=named)
    assert call(monkeypatch, *words, tmp_path / "b") == 0
    assert result(tmp_path / "a")["scores"] == result(tmp_path / "b")["scores"]
    assert result(tmp_path / "b")["settings"]["text_towers"]["aligned"] == named
    holds(embed=Project(-tower.visual.proj.data), text=named, text_tower=tower)
    assert call(monkeypatch, *words, tmp_path / "c") == 0
    old, new = (result(tmp_path / out)["scores"][-1] for out in "bc")
    assert old["model"] == new["model"] == "aligned" and old["per_class"] != new["per_class"]


def test_mistakes_end_with_one_message_and_exit_code_2(
    run_of, config, holds, monkeypatch, capsys, pairs, tmp_path
) -> None:
    run, flags = run_of(), ("--text-model", config, "--text-pretrained", "none")

    def mistake(*words: object, command: str = "retrieval", val: Path = pairs) -> str:
        given = ("--model", run, "--val", val, "--out", tmp_path / "out", "--overwrite")
        return refused(monkeypatch, capsys, command, *given, *words)

    assert "--text-pretrained is missing: give both" in mistake("--text-model", config)
    assert "--text-model is missing: give both" in mistake("--text-pretrained", "none")
    assert "names no text tower" in mistake()
    folders = class_folders(tmp_path / "val", 2, 1)
    assert "names no text tower" in mistake(command="zero-shot", val=folders)
    assert "needs one {}" in mistake(*flags, "--template", "a photo")
    assert "--captions 0" in mistake(*flags, "--captions", 0)
    assert "it has no text" in mistake(*flags, val=folders)
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    assert "line 1" in mistake(*flags, val=tmp_path / "bad.jsonl")
    holds(embed=Project(torch.eye(64)[:, :23]), text={"model": str(config), "pretrained": "none"})
    for command, val in (("retrieval", pairs), ("zero-shot", folders)):
        wrong = mistake(command=command, val=val)
        assert "its joint space has 24 dimensions, and aligned was trained for one of 23" in wrong
    holds(text={"model": None, "pretrained": "none"})
    assert "names no text tower" in mistake()
    holds(text_tower=nn.Identity())
    assert "does not say whose tokenizer" in mistake("--against", "none")


def test_a_run_of_two_open_clip_towers_is_set_against_them_as_they_were(
    evaluate, config, pairs, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("locfast.methods.clip")
    words = f"--method clip --model open_clip --clip.text {config} --clip.text-pretrained none --data {pairs}"
    words += f" --out {tmp_path / 'tuned'} --steps 2 --batch-size 4 --lr 3e-3 --workers 0 --val none --device cpu"
    run = train(parse_train([*words.split(), "--max-bad", "0.2"]))
    found = evaluate("--model", run)
    start, tuned = found["models"]
    assert tuned == "tuned" and found["models"]["tuned"]["against"] == start
    assert found["models"][start]["model"] == "open_clip"
    towers = found["settings"]["text_towers"]
    assert towers[start] == {"model": str(config), "pretrained": "none"}
    assert towers["tuned"] == {"model": str(config), "pretrained": "trained by the run"}
    assert not any("Expected" in note or "left out" in note for note in found["notes"])

    # the start is open_clip's model itself: its image tower as a timm folder, cropped as it, gives the same figures
    tower = open_text_tower(str(config), "none", seed=0).model
    model = load_backbone("vit_base_patch16_clip_224", False, image_size=32, **TINY).model
    model.load_state_dict(checkpoint_filter_fn(dict(tower.state_dict()), model), strict=False)
    model.pretrained_cfg["crop_pct"] = 1.0
    save_for_hf(model, str(tmp_path / "image-tower"), safe_serialization=True)
    flags = ("--text-model", config, "--text-pretrained", "none")
    plain = evaluate("--model", tmp_path / "image-tower", *flags, out="plain")
    assert told(found, start) == told(plain, str(tmp_path / "image-tower"))
    assert call(monkeypatch, "knn", "--model", run, "--k", 3, "--out", tmp_path / "knn", *folders(tmp_path)) == 0


def folders(root: Path) -> tuple[object, ...]:
    return ("--train", class_folders(root / "train", 4, 0), "--val", class_folders(root / "val", 2, 1))
