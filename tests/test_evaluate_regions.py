"""`python -m locfast.evaluate regions`: runs, plain towers and exports beside each other on annotations and phrases."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor
from torchvision.ops import roi_align

from locfast.cli import parse_train
from locfast.data.loader import Loader
from locfast.data.regions.annotated import AnnotatedBoxes
from locfast.data.spec import ImageSpec
from locfast.engine.run import train
from locfast.engine.run_folder import load_method
from locfast.eval.global_ability.text_tower import open_text_tower, tuned_text_tower
from locfast.eval.regions.reading import region_view
from locfast.models.backbone import load_backbone
from locfast.models.prompter import Prompter
from locfast.subject import open_start, open_subject
from tests.eval.region_files import NAMES, pictures, write_annotations, write_lines
from tests.eval.tiny_clip import CONFIGS, TINY
from tests.test_evaluate_command import call, refused, result
from tests.test_evaluate_text import one_thread  # noqa: F401  (a fixture of every test)

pytest.importorskip("open_clip")

RECOGNITION = [f"region recognition, {what}" for what in ("mAcc", "accuracy")]
RETRIEVAL = [f"{way}, R@{k}" for way in ("region to phrase", "phrase to region") for k in (1, 5, 10)]
CAPTIONS = [f"{way}, R@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("configs") / "locfast-text.json"
    file.write_text(json.dumps(CONFIGS["clip"]))
    return file


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("lines"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_annotations(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def run_of(config: Path, lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run of three fast steps; its name is the first word."""
    made: dict[str, Path] = {}

    def make(name: str = "self", *words: str) -> Path:
        if name not in made:
            given = f"--method cloc --model open_clip --cloc.text {config} --cloc.text-pretrained none --data {lines}"
            given += f" --out {tmp_path_factory.mktemp('runs') / name} --steps 3 --batch-size 4 --lr 3e-3 --workers 0"
            given += " --cloc.optim.warmup-steps 0 --val none --device cpu --max-bad 0.5"
            made[name] = train(parse_train([*given.split(), *words]))
        return made[name]

    return make


@pytest.fixture(scope="module")
def tower(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image tower of that open_clip model as a timm folder: CLIP without a prompter."""
    clip = open_text_tower(str(config), "none", seed=0).model
    model = load_backbone("vit_base_patch16_clip_224", False, image_size=32, **TINY).model
    model.load_state_dict(checkpoint_filter_fn(dict(clip.state_dict()), model), strict=False)
    folder = tmp_path_factory.mktemp("towers") / "clip"
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def done(val: object, *words: object, out: str = "out") -> dict[str, Any]:
        assert call(monkeypatch, "regions", "--val", val, "--out", tmp_path / out, *words) == 0
        return result(tmp_path / out)

    return done


def of_label(found: dict[str, Any], label: str) -> dict[str, dict[str, Any]]:
    return {one["setting"]: one for one in found["scores"] if one["model"] == label}


def test_a_run_is_read_by_prompter_and_by_roi_align_beside_its_start(evaluate, run_of, coco, config, capsys) -> None:
    found = evaluate(coco, "--model", run_of())
    start = f"open_clip's {config} (random weights)"
    labels = [f"{start}, RoI-align", "self, prompter", "self, RoI-align"]
    assert [(one["setting"], one["model"]) for one in found["scores"]] == [
        (setting, label) for setting in RECOGNITION for label in labels
    ]
    old = of_label(found, labels[0])
    for label in labels[1:]:
        for setting, one in of_label(found, label).items():
            assert one["difference"]["against"] == labels[0]
            assert one["difference"]["accuracy"] == pytest.approx(one["accuracy"] - old[setting]["accuracy"])
            assert one["interval"][0] <= one["accuracy"] <= one["interval"][1]
    mean = of_label(found, "self, prompter")[RECOGNITION[0]]
    assert set(mean["per_class"]) == set(NAMES)
    assert mean["accuracy"] == mean["mean_per_class"] == pytest.approx(sum(mean["per_class"].values()) / 4)
    settings = found["settings"]
    assert settings["queries"] == {"images": 12, "regions": 24, "phrases": 4}
    assert settings["left_out"] == {"crowd": 1, "by_model": {start: {}, "self": {}}}
    assert settings["views"] == {start: "pad", "self": "pad"}
    assert settings["readings"] == {start: ["RoI-align"], "self": ["prompter", "RoI-align"]}
    assert found["models"]["self"]["against"] == start and found["data"]["val"]["read"] == 12
    shown = " ".join(capsys.readouterr().out.split())
    for told in (
        "region recognition",
        "1 boxes, crowd",
        "1 images of",
        "1 of 5 classes have no region here",
        "zebra",
        "24 regions of 12 images are asked about",
    ):
        assert told in shown


def by_hand(source, subject, text, crop: str, ask: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """Accuracy by class, image by image and box by box. ask: patches [N, C] and a box [4] in [0, 1] -> [E]."""
    view, right = region_view(subject.backbone, crop), dict[str, list[bool]]()
    names = text.encode(source.classes)
    loader = Loader(source, ImageSpec({"view": view}), seed=0, workers=0)
    side = view.size[0]
    for index, batch in enumerate(loader.sequential(0, torch.arange(len(source)).split(1))):
        tokens = subject.backbone.forward_features(batch["views"]["view"], softcap=None)[0]
        height, width = source.sizes[index].tolist()
        for region in source.read(index).regions:
            if crop == "pad":
                shown = (side, max(1, height * side // width)) if width > height else (width * side // height, side)
                left, top = (side - shown[0]) // 2, (side - shown[1]) // 2
                x, y = shown[0] / width, shown[1] / height
            else:
                left, top, x, y = 0, 0, side / width, side / height
            a, b, c, d = region.box
            box = torch.tensor([left + a * x, top + b * y, left + c * x, top + d * y]) / side
            best = (names @ ask(tokens[subject.backbone.num_prefix_tokens :], box)).argmax()
            right.setdefault(region.text, []).append(source.classes[int(best)] == region.text)
    return {name: sum(own) / len(own) for name, own in right.items()}


@pytest.mark.parametrize(("crop", "words"), [("pad", ()), ("squash", ("--view", "squash"))])
@torch.no_grad()
def test_figures_are_those_of_the_parts_put_together_by_hand(evaluate, run_of, coco, crop, words) -> None:
    found = evaluate(coco, "--model", run_of(), "--against", "none", *words)
    subject, method = open_subject(str(run_of())), load_method(run_of())
    text = tuned_text_tower(subject.text.model, subject.text.tower)

    def prompter(patches: Tensor, box: Tensor) -> Tensor:
        return method.prompter(patches[None], box[None, None])[0, 0]

    def roi(patches: Tensor, box: Tensor) -> Tensor:
        grid = method.image.project(patches).T.unflatten(1, subject.backbone.grid)[None]
        place = box * torch.tensor([*subject.backbone.grid[::-1]] * 2)
        return roi_align(grid, torch.cat([torch.zeros(1), place])[None], 7, aligned=True).mean((-2, -1))[0]

    source, told = AnnotatedBoxes(coco), []
    for label, ask in (("self, prompter", prompter), ("self, RoI-align", roi)):
        told.append(of_label(found, label)[RECOGNITION[0]]["per_class"])
        assert told[-1] == pytest.approx(by_hand(source, subject, text, crop, ask))
    assert all(one["difference"] is None for one in found["scores"])
    assert 0 < sum(told[0].values()) < 4  # something is found and something missed


def test_phrases_and_captions_are_retrieved_where_a_source_has_them(evaluate, run_of, lines, tmp_path) -> None:
    found = evaluate(lines, "--model", run_of(), "--against", "none")
    of = of_label(found, "self, prompter")
    assert list(of) == [*RECOGNITION, *RETRIEVAL] and list(of_label(found, "self")) == CAPTIONS
    assert found["settings"]["queries"] == {"images": 12, "regions": 24, "phrases": 4, "captions": 20}
    assert of["region to phrase, R@5"]["accuracy"] == 1  # of four phrases
    assert set(of[RECOGNITION[0]]["per_class"]) == set(NAMES)
    only = evaluate(lines, "--model", run_of(), "--against", "none", "--no-recognition", out="only")
    assert {one["setting"] for one in only["scores"]} == {*RETRIEVAL, *CAPTIONS}
    roi = of_label(found, "self, RoI-align").items()
    assert of_label(only, "self, RoI-align") == {setting: one for setting, one in roi if "R@" in setting}
    (tmp_path / "names").write_text("\n".join([*NAMES, "zebra"]))
    more = evaluate(lines, "--model", run_of(), "--no-retrieval", "--classes", tmp_path / "names", out="more")
    assert {one["setting"] for one in more["scores"]} == {*RECOGNITION, *CAPTIONS}
    assert any("1 of 5 classes have no region" in note for note in more["notes"])


def test_annotations_have_phrases_only_where_they_are_asked_for(evaluate, run_of, coco) -> None:
    found = evaluate(coco, "--model", run_of(), "--against", "none", "--retrieval")
    assert list(of_label(found, "self, prompter")) == [*RECOGNITION, *RETRIEVAL]


def test_lvis_names_and_a_template_are_what_the_text_tower_reads(evaluate, run_of, tmp_path, monkeypatch) -> None:
    from locfast.eval.global_ability.text_tower import TextTower

    read: list[str] = []
    encode = TextTower.encode
    monkeypatch.setattr(
        TextTower, "encode", lambda self, texts, *rest: read.extend(texts) or encode(self, texts, *rest)
    )
    file = write_annotations(tmp_path / "lvis", lvis=True)
    words = ("--model", run_of(), "--against", "none")
    found = evaluate(file, *words)
    asked = ["leaf", "red kite", "parrot (bird)", "zebra", "hot dog"]
    assert [text for text in read if text != "a photo"] == asked
    read.clear()
    evaluate(file, *words, "--template", "a photo of a {}.", out="template")
    assert [text for text in read if text != "a photo"] == [f"a photo of a {name}." for name in asked]
    (tmp_path / "names").write_text("green\nkite\nparrot\nhorse\nsausage\n")
    read.clear()
    named = evaluate(file, *words, "--classes", tmp_path / "names", out="named")
    assert [text for text in read if text != "a photo"] == ["green", "kite", "parrot", "horse", "sausage"]
    assert named["settings"]["names_of_classes"]["red kite"] == "kite"
    assert set(found["scores"][0]["per_class"]) == set(named["scores"][0]["per_class"]) == set(NAMES)


def test_images_are_drawn_from_the_seed(evaluate, run_of, lines) -> None:
    words = ("--model", run_of(), "--against", "none", "--no-retrieval", "--images", 5)
    one, same = evaluate(lines, *words, out="one"), evaluate(lines, *words, out="same")
    other = evaluate(lines, *words, "--seed", 3, out="other")
    assert one["scores"] == same["scores"] != other["scores"]
    assert one["data"]["val"]["images"] == one["data"]["val"]["read"] == one["settings"]["queries"]["images"] == 5


def test_a_tower_without_a_prompter_is_read_by_roi_align(evaluate, run_of, tower, config, coco) -> None:
    flags = ("--text-model", config, "--text-pretrained", "none")
    found = evaluate(coco, "--model", tower, *flags)
    assert {one["model"] for one in found["scores"]} == {f"{tower}, RoI-align"}
    # the run's own start is that very tower
    run = evaluate(coco, "--model", run_of("pretrained", "--cloc.init", "pretrained"), *flags, out="run")
    start = of_label(run, f"open_clip's {config}, RoI-align")
    assert start[RECOGNITION[0]]["per_class"] == of_label(found, f"{tower}, RoI-align")[RECOGNITION[0]]["per_class"]
    against = evaluate(coco, "--model", run_of(), "--against", tower, *flags, out="against")
    for how in ("prompter", "RoI-align"):
        for one in of_label(against, f"self, {how}").values():
            assert one["difference"]["against"] == f"{tower}, RoI-align"
    both = evaluate(coco, "--model", run_of(), "--against", run_of("other", "--seed", "1"), out="both")
    for how in ("prompter", "RoI-align"):
        assert of_label(both, f"self, {how}")[RECOGNITION[0]]["difference"]["against"] == f"other, {how}"


def test_a_run_with_roi_align_in_the_prompters_place_is_read_by_its_own(evaluate, run_of, coco) -> None:
    roi = run_of("roi", "--cloc.prompter", "roi", "--cloc.no-grounding")
    found = evaluate(coco, "--model", roi, "--against", run_of())
    assert {one["model"] for one in found["scores"]} == {"self, prompter", "self, RoI-align", "roi, RoI-align"}
    subject, method = open_subject(str(roi)), load_method(roi)
    text = tuned_text_tower(subject.text.model, subject.text.tower)

    def own(patches: Tensor, box: Tensor) -> Tensor:
        return method.prompter(patches[None], box[None, None])[0, 0]

    expected = by_hand(AnnotatedBoxes(coco), subject, text, "pad", torch.no_grad()(own))
    assert of_label(found, "roi, RoI-align")[RECOGNITION[0]]["per_class"] == pytest.approx(expected)


def test_a_run_looks_as_its_config_says_and_its_start_likewise(evaluate, run_of, tmp_path, capsys) -> None:
    coco = write_annotations(tmp_path / "coco")
    content = json.loads(coco.read_text())
    edge = {**content["annotations"][0], "image_id": content["images"][3]["id"], "bbox": [0.0, 0.0, 9.0, 50.0]}
    content["annotations"].append(edge)  # of an image of 200 x 50, which is seen from 75 to 125
    coco.write_text(json.dumps(content))
    cut = run_of("cut", "--cloc.crop", "center")
    found = evaluate(coco, "--model", cut)
    assert set(found["settings"]["views"].values()) == {"center"}
    assert found["settings"]["left_out"]["by_model"]["cut"] == {"left the view": 1}
    assert found["settings"]["queries"]["regions"] == 24
    assert "as cut sees them: 1 left the view" in " ".join(capsys.readouterr().out.split())
    padded = evaluate(coco, "--model", cut, "--view", "pad", out="padded")
    assert padded["settings"]["queries"]["regions"] == 25
    assert open_start(str(cut)).crop == "center" and open_start(str(cut)).prompter is None


def test_an_export_has_the_prompter_that_lies_beside_it(evaluate, tower, config, coco, tmp_path, monkeypatch) -> None:
    """Whoever reads such files gets the folder; what it makes of them is read like a run's."""
    module, seen = ModuleType("locfast.models.prompter_file"), []

    def load_prompter(folder: Path) -> Prompter:
        seen.append(folder)
        torch.manual_seed(3)
        return Prompter(TINY["embed_dim"], CONFIGS["clip"]["embed_dim"])

    module.load_prompter = load_prompter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    flags = ("--text-model", config, "--text-pretrained", "none")
    assert open_subject(str(tower)).prompter is None and seen == []
    copy = tmp_path / "export"
    copy.mkdir()
    for file in tower.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "prompter.safetensors").write_bytes(b"")
    (copy / "prompter.json").write_text('{"padded": false}')
    assert open_subject(str(copy)).crop == "center"
    seen.clear()
    (copy / "prompter.json").write_text('{"padded": true}')
    found = evaluate(coco, "--model", copy, *flags)
    assert found["settings"]["views"] == {str(copy): "pad"}
    assert seen == [copy] and {one["model"] for one in found["scores"]} == {f"{copy}, prompter", f"{copy}, RoI-align"}
    prompter = open_subject(str(copy)).prompter
    assert prompter is not None and not prompter.training
    assert not any(parameter.requires_grad for parameter in prompter.parameters())


def test_mistakes_end_with_one_message_and_exit_code_2(
    run_of, lines, coco, tower, config, monkeypatch, capsys, tmp_path
) -> None:
    def mistake(*words: object, val: object = lines, model: object = run_of()) -> str:
        given = ("regions", "--model", model, "--val", val, "--out", tmp_path / "out", "--overwrite")
        return refused(monkeypatch, capsys, *given, *words)

    assert "--template 'a photo': it needs one {}" in mistake("--template", "a photo")
    assert "--roi-size 0" in mistake("--roi-size", 0)
    assert "--images 13: there are 12" in mistake("--images", 13)
    assert "asks nothing" in mistake("--no-recognition", "--no-retrieval")
    assert "names no text tower" in mistake(model=tower)
    plain = tmp_path / "siglip"
    model = load_backbone("vit_base_patch16_siglip_gap_224", False, image_size=32, **TINY).model
    save_for_hf(model, str(plain), safe_serialization=True)
    flags = ("--text-model", config, "--text-pretrained", "none")
    assert "the way into a joint space works for CLIP" in mistake(*flags, model=plain)
    (tmp_path / "images").mkdir()
    for number, (data, _, _) in enumerate(pictures(3)):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(data)
    assert "asked for images with regions, found" in mistake(val=tmp_path / "images")
    assert "no such file" in mistake(val=tmp_path / "instances_val2017.json")
    assert "only annotations (.json) need one" in mistake("--image-folder", tmp_path)
    assert "found none of the first 8" in mistake("--image-folder", tmp_path, val=coco)
    (tmp_path / "names").write_text("leaf\nred kite\n")
    unknown = mistake("--classes", tmp_path / "names")
    assert "2 phrases of regions are none of its 2 classes: hot dog, parrot (bird)" in unknown
    assert "it has 2 lines" in mistake("--classes", tmp_path / "names", val=coco)
    (tmp_path / "names").write_text("leaf\nleaf\n")
    assert "the name leaf stands there twice" in mistake("--classes", tmp_path / "names")
    assert "cannot be read" in mistake("--classes", tmp_path / "gone")
