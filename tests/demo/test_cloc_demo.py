"""CLOC's demo, small: three models from the same weights, figures that say what they claim, and boxes in the report."""

import json

import pytest
import torch

from locfast.cli import parse_train
from locfast.config.registry import method_config
from locfast.demo.claim import figure_gains
from locfast.demo.cloc import Settings, boxes_shown, changed, run_demo, same_box_always
from locfast.demo.regions import (
    NAMES,
    Known,
    TestScenes,
    figures_of,
    iou,
    known,
    mean_accuracy,
    plain_pooler,
    recall,
    region_retrieval,
)
from locfast.engine.run_folder import load_method
from locfast.errors import UserError
from tests.report.pages import check_page, marks

pytest.importorskip("open_clip")
TestScenes.__test__ = False  # no test of pytest's, whatever its name
ALONE = ("boxes of phrases, mean IoU", "boxes of phrases, IoU > 0.5")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cloc"
    return run_demo(
        parse_train(["--method", "cloc", "--steps", "3", "--batch-size", "8", "--out", str(out)]), Settings(test=96)
    )


@pytest.fixture(scope="module")
def scenes() -> TestScenes:
    return TestScenes.of(1, 64, torch.device("cpu"))


def perfect(scenes: TestScenes) -> Known:
    """A model that knows every scene."""
    generator = torch.Generator().manual_seed(0)
    phrases = torch.nn.functional.normalize(torch.randn(len(NAMES), 64, generator=generator), dim=1)
    captions = sorted({record.text for record in scenes.records})
    images = torch.eye(len(captions))[[captions.index(record.text) for record in scenes.records]]
    return Known(images, images, phrases[scenes.phrase], phrases, scenes.boxes)


def test_no_flag_means_the_demo_of_the_method() -> None:
    config = parse_train(["--method", "cloc"])
    assert (config.model, config.data, config.cloc.text) == ("demo", "demo", "demo")
    assert parse_train(["--method", "cloc", "--data", "x"]).cloc.text == "ViT-B-16"


def test_a_run_holds_its_figures_and_the_two_other_runs(run) -> None:
    told = json.loads((run / "demo.json").read_text())
    assert told["columns"] == ["RoI-align", "prompter", "CLIP alone"] and len(told["figures"]) == 8
    for figure in told["figures"]:
        sides = [figure[side] for side in ("baseline", "teacher")]
        assert 0 <= figure["ours"] <= 100
        assert sides == [None, None] if figure["name"] in ALONE else all(0 <= side <= 100 for side in sides)
    assert set(told["seconds"]) == {"prompter", "roi", "clip"}
    roi, clip = (load_method(run / name).config for name in ("roi", "clip"))
    assert (roi.prompter, roi.grounding, roi.region_weight) == ("roi", False, None)
    assert (clip.prompter, clip.grounding, clip.region_weight) == ("roi", False, 0.0)


def test_the_report_shows_boxes_of_phrases(run) -> None:
    shown = json.loads((run / "demo.json").read_text())["boxes"]
    page = check_page((run / "report.html").read_text())
    asked = [one["phrase"] for scene in shown for one in scene["asked"]]
    assert 2 * len(shown) <= len(asked)
    assert [mark.partition(":")[0] for mark in marks(page)][-len(asked) :] == asked


def test_all_three_start_from_the_same_towers_and_differ_in_the_fields_told() -> None:
    config = parse_train(["--method", "cloc", "--seed", "3"])
    other = changed(config, prompter="roi", grounding=False)
    own, theirs = method_config(config), method_config(other)
    different = [name for name in vars(own) if getattr(own, name) != getattr(theirs, name)]
    assert (other.seed, other.steps, sorted(different)) == (3, config.steps, ["grounding", "prompter"])


def test_clip_alone_leaves_its_pooler_as_it_was(run) -> None:
    from locfast.methods import create_method

    config = parse_train(["--config", str(run / "clip/config.yaml")])
    fresh = create_method("cloc", method_config(config), model="demo", seed=config.seed)
    trained = load_method(run / "clip")
    # its gradient is an exact zero, so that AdamW moves nothing but by weight decay
    before, after = fresh.prompter.project, trained.prompter.project
    assert torch.equal(before.bias, after.bias)
    torch.testing.assert_close(before.weight, after.weight, rtol=1e-3, atol=0)
    assert not torch.equal(fresh.image.backbone.model.head.weight, trained.image.backbone.model.head.weight)


def test_a_plain_pooler_averages_projected_tokens(run) -> None:
    method = load_method(run / "clip")
    pooler, tokens = plain_pooler(method), torch.randn(1, 36, 96, generator=torch.Generator().manual_seed(0))
    # the frame of equal tokens has their projection; halves of one of unequal tokens differ
    all_of_it = pooler(torch.ones(1, 36, 96), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))[0, 0]
    torch.testing.assert_close(all_of_it, method.image.project(torch.ones(96)))
    left, right = pooler(tokens, torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]]))[0]
    assert not torch.allclose(left, right)


def test_a_model_that_knows_scores_a_hundred(scenes) -> None:
    figures = figures_of(perfect(scenes), scenes)
    assert len(figures) == 8 and all(value == pytest.approx(100) for value in figures.values())


def test_a_model_that_confuses_shapes_still_knows_the_colours(scenes) -> None:
    found = perfect(scenes)
    swapped = Known(found.images, found.captions, found.phrases[scenes.phrase ^ 1], found.phrases, None)
    figures = figures_of(swapped, scenes)
    assert figures["region recognition, 24 phrases"] == 0 and "boxes of phrases, mean IoU" not in figures
    assert figures["region recognition, 12 pairs of colours"] == pytest.approx(100)


def test_duplicates_of_a_phrase_are_right(scenes) -> None:
    likeness = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.2, 0.1]])
    alike = torch.tensor([[True, True, False], [False, False, True]])
    assert recall(likeness, alike, 1) == 0.5 and recall(likeness, alike, 3) == 1.0
    assert region_retrieval(perfect(scenes), scenes) == (1.0, 1.0)


def test_mean_accuracy_weighs_classes_and_not_regions() -> None:
    assert mean_accuracy(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])) == 0.5


def test_iou_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5], [0.9, 0.9, 0.1, 0.1], [0.2, 0.2, 0.4, 0.4]])
    truth = torch.tensor([[0.25, 0.0, 0.75, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.2, 0.2, 0.4, 0.4]])
    torch.testing.assert_close(iou(boxes, truth), torch.tensor([1 / 3, 0.0, 0.0, 1.0]))


def test_regions_are_asked_in_their_own_scene(run) -> None:
    method, scenes = load_method(run), TestScenes.of(5, 300, torch.device("cpu"))  # more than one batch of 256
    all_of_them, last = known(method, scenes), int((scenes.scene == 299).nonzero()[0])
    tokens = method.image.backbone((scenes.images[299:].float() / 255 - 0.3) / 0.3)[:, 1:]
    with torch.no_grad():
        alone = method.prompter(tokens, scenes.boxes[None, last : last + 1])[0]
    torch.testing.assert_close(all_of_them.regions[last : last + 1], torch.nn.functional.normalize(alone, dim=-1))
    assert all_of_them.boxes.shape == scenes.boxes.shape


def test_only_phrases_that_occur_once_are_grounded() -> None:
    scenes = TestScenes.of(2, 512, torch.device("cpu"))
    for region in range(0, len(scenes.boxes), 7):
        own = [r.text for r in scenes.records[scenes.scene[region]].regions]
        assert scenes.unique[region] == (own.count(NAMES[scenes.phrase[region]]) == 1)
    assert not scenes.unique.all()
    assert all(
        one["iou"] == pytest.approx(1) for scene in boxes_shown(perfect(scenes), scenes) for one in scene["asked"]
    )
    assert 0 < same_box_always(scenes)["mean IoU"] < 50


def test_a_claim_has_both_gains_and_the_interval_of_what_stands_alone() -> None:
    both = [{"name": "x", "baseline": 1.0 + i, "ours": 3.0 + 2 * i, "teacher": 0.0} for i in range(3)]
    alone = [{"name": "y", "baseline": None, "ours": 40.0 + i, "teacher": None} for i in range(3)]
    found = figure_gains([{"figures": list(pair)} for pair in zip(both, alone, strict=True)])
    assert (found["x"]["gain"]["mean"], found["x"]["gain_over_teacher"]["mean"]) == (3.0, 5.0)
    assert set(found["y"]) == {"ours", "alone"} and found["y"]["alone"]["values"] == [40.0, 41.0, 42.0]


def test_a_run_that_is_there_is_not_touched(run) -> None:
    with pytest.raises(UserError, match="a run is already there"):
        run_demo(parse_train(["--method", "cloc", "--out", str(run)]), Settings(test=8))
