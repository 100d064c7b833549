"""CLOC: the loss of equations 1 to 4 and its gradients, with missing regions, duplicates, micro-batches and ranks."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from locfast.config.cloc import ClocConfig
from locfast.data.spec import Record
from locfast.errors import UserError
from locfast.methods.cloc import Cloc, Draw
from locfast.random import Keys
from tests.methods.region_pairs import (
    assert_alike,
    batch_of,
    chosen,
    good_regions,
    gradients,
    make,
    plainly,
    records,
    tiny_towers,
)

pytest.importorskip("open_clip")

ROOT = Path(__file__).parents[2]
ALL = list(range(8))
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "no filter": {"filter_threshold": None},
    "no grounding": {"grounding": False},
    "cross": {"prompter": "cross"},
    "roi": {"prompter": "roi", "grounding": False},
    "two regions": {"regions": 2},
    "fixed weight": {"region_weight": 0.3},
    "fixed temperature": {"learn_temperature": False, "temperature": 0.05, "region_temperature": 0.1},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_towers(tmp_path_factory.mktemp("cloc"))


def keys(rows: list[int], seed: int = 3) -> Keys:
    return Keys(seed, torch.zeros(len(rows), dtype=torch.int64), torch.tensor(rows))


@pytest.mark.parametrize("name", CHOICES)
def test_loss_and_every_gradient_are_those_of_the_equations(text, name):
    method = make(text, **CHOICES[name])
    batch, draw = batch_of(ALL), method.draw(keys(ALL))
    wanted, told = plainly(method, batch, draw), method(batch, draw)
    for part, value in wanted.items():
        torch.testing.assert_close(told[part].detach(), value.detach().to(told[part].dtype), rtol=1e-7, atol=0)
    found, expected = gradients(method, told["loss"]), gradients(method, wanted["loss"])
    assert_alike(found, expected, rtol=1e-6)
    still = {n for n, g in expected.items() if not g.abs().max()}
    assert still <= {"prompter.phrase.weight", "prompter.phrase.bias"} and (name == "no grounding") == bool(still)
    assert told["regions"].item() == pytest.approx(
        (2 + 2 + 1 + 2 + 1 if name == "two regions" else 2 + 4 + 1 + 4 + 1) / 8
    )
    assert told["regions_dropped"].item() == pytest.approx(5 / 8)
    assert told["region_weight"].item() == pytest.approx(0.3 if name == "fixed weight" else 5 / 8)


def test_duplicates_of_a_phrase_are_no_negatives_and_the_filter_changes_the_region_loss_alone(text):
    batch = batch_of(ALL)
    draw = make(text).draw(keys(ALL))
    said = [[r.text for r in chosen(record, places)] for record, places in zip(records(), draw.regions, strict=True)]
    phrases = [phrase for image in said for phrase in image]
    assert len(set(phrases)) < len(phrases)
    filtered, plain = (make(text, filter_threshold=t)(batch, draw) for t in (0.9, None))
    assert filtered["region"] < plain["region"]
    for part in ("clip", "grounding", "region_weight"):
        assert filtered[part] == plain[part]


def test_without_grounding_the_other_losses_are_the_same_bits_and_no_head_is_there(text):
    batch, whole, less = batch_of(ALL), make(text), make(text, grounding=False)
    draw = whole.draw(keys(ALL))
    told, without = whole(batch, draw), less(batch, draw)
    assert set(told) - set(without) == {"grounding"}
    for part in ("clip", "region", "region_weight"):
        assert told[part] == without[part]
    assert without["loss"] == without["clip"] + without["region_weight"] * without["region"]
    assert {n for n, _ in whole.named_parameters()} - {n for n, _ in less.named_parameters()} == {
        f"box_head.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }


def test_another_prompter_changes_the_region_losses_alone(text):
    batch = batch_of(ALL)
    draw = make(text).draw(keys(ALL))
    told = {kind: make(text, prompter=kind, grounding=False)(batch, draw) for kind in ("self", "cross", "roi")}
    assert len({t["clip"].item() for t in told.values()}) == 1
    assert len({t["region"].item() for t in told.values()}) == 3


@pytest.mark.parametrize("fields", [{}, {"freeze_text": True}, {"prompter": "roi", "grounding": False}])
def test_micro_batches_have_the_gradient_of_one_large_batch(text, fields):
    method = make(text, **fields)
    whole = method(batch_of(ALL), method.draw(keys(ALL)))
    expected = gradients(method, whole["loss"])
    parts = [[0, 1], [2, 3], [4, 5], [6, 7]]  # of the second, no image has regions
    batches, draws = [batch_of(part) for part in parts], [method.draw(keys(part)) for part in parts]
    with torch.no_grad():
        looks = [method.look(batch, draw) for batch, draw in zip(batches, draws, strict=True)]
    found = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    for batch, draw, ahead in zip(batches, draws, method.weigh(looks), strict=True):
        told = method({**batch, "ahead": ahead}, draw)
        for part in set(told) - {"regions", "regions_dropped"}:
            assert told[part].item() == pytest.approx(whole[part].item(), rel=1e-9), part
        for name, gradient in gradients(method, told["loss"] / len(parts)).items():
            found[name] += gradient
    assert_alike(found, expected)


def test_a_batch_without_any_region_trains_as_a_clip_and_every_weight_takes_part(text):
    method = make(text)
    told = method(batch_of([2, 3, 5]), method.draw(keys([2, 3, 5])))
    assert told["region_weight"] == told["region"] == told["grounding"] == 0 == told["regions"]
    assert told["loss"] == told["clip"] > 0
    named = [p for p in method.parameters() if p.requires_grad]
    found = torch.autograd.grad(told["loss"], named)  # raises where one took no part, which would stall other ranks
    assert all(g.isfinite().all() for g in found)


def test_regions_are_drawn_by_the_key_of_their_image_and_none_twice(text):
    method = make(text)
    draw = method.draw(keys(ALL))
    some = method.draw(keys([6, 1]))
    assert torch.equal(some.regions, draw.regions[[6, 1]]) and torch.equal(some.caption, draw.caption[[6, 1]])
    assert draw.regions.shape == (8, 4) and draw.regions.device.type == "cpu"
    seen: dict[str, int] = {}
    for seed in range(200):
        taken = chosen(records()[6], method.draw(keys([6], seed)).regions[0])
        assert len({region.text for region in taken}) == 4
        for region in taken:
            seen[region.text] = seen.get(region.text, 0) + 1
    assert len(seen) == 6
    # 4 of 6, 200 times: 133 each, with a deviation of 6.7
    assert all(abs(count - 133) < 5 * 6.7 for count in seen.values())


def test_the_phrases_of_a_step_are_encoded_once_however_often_they_occur(text):
    method = make(text)
    batch = batch_of(ALL)
    draw = method.draw(keys(ALL))
    prompts = method.prompts(batch, draw)
    assert len(prompts.phrases) == len(set(prompts.phrases)) < len(prompts.phrase_of) == 12
    tokens = method.all_tokens(batch, draw, prompts)
    assert len(tokens.captions) == 8 and len(tokens.phrases) == len(prompts.phrases)
    assert prompts.counts == (8, 5, 12)
    assert {k: v for k, v in prompts.dropped.items() if v} == {"not finite": 2, "swapped": 2, "no text": 1}


def test_a_caption_is_drawn_and_an_image_without_a_caption_is_not_asked_for(text):
    method = make(text)
    spec = method.image_spec()
    assert spec.text and spec.regions and spec.records and spec.views["image"].crop == "pad"
    assert method.validation_spec().views["image"].crop == "pad"
    assert make(text, crop="random_resized").validation_spec().views["image"].crop == "center"
    batch = batch_of([0])
    batch["records"] = [Record(b"", texts=("one", "two"), regions=good_regions_of(0))]
    draws = [Draw(torch.tensor([place]), torch.zeros(1, 4)) for place in (0.1, 0.9)]
    low, high = (method.all_tokens(batch, draw, method.prompts(batch, draw)) for draw in draws)
    assert not torch.equal(low.captions, high.captions) and torch.equal(low.phrases, high.phrases)


def good_regions_of(row: int) -> Any:
    return tuple(good_regions(records()[row]))


def test_matrices_decay_and_corners_scales_and_vectors_do_not(text):
    method = Cloc(ClocConfig(text=text), model="open_clip", pretrained=False)
    names = {id(p): name for name, p in method.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in method.parameter_groups() for p in group["params"]}
    assert set(decays) == {name for name, p in method.named_parameters() if p.requires_grad}
    by_name = dict(method.named_parameters())
    for name, decay in decays.items():
        assert decay == (0.2 if by_name[name].ndim > 1 and name != "prompter.corners.kind" else 0.0), name
    assert all(group.get("lr_scale", 1.0) == 1.0 for group in method.parameter_groups())


def test_two_scales_start_where_they_are_told_and_stay_below_a_hundred(text):
    method = Cloc(ClocConfig(text=text, temperature=0.05, region_temperature=0.2), model="open_clip", pretrained=False)
    assert method.scale().item() == pytest.approx(20) and method.region_scale().item() == pytest.approx(5)
    with torch.no_grad():
        method.region_log_scale.fill_(6.0)
    assert method.region_scale().item() == pytest.approx(100) and method.scale().item() == pytest.approx(20)


def test_a_run_says_that_it_starts_without_the_weights_of_its_model(text):
    assert any("--cloc.init pretrained" in note for note in make(text).notes(4, 1, 1))
    assert not make(text, init="pretrained", text_pretrained="none").notes(4, 1, 1)


def test_temperatures_that_are_learned_are_logged(text):
    batch = batch_of(ALL)
    learned, fixed = make(text), make(text, learn_temperature=False)
    with torch.no_grad():
        learned.log_scale.fill_(2.0)
        learned.region_log_scale.fill_(3.0)
    told = learned(batch, learned.draw(keys(ALL)))
    assert told["temperature"].item() == pytest.approx(math.exp(-2))
    assert told["region_temperature"].item() == pytest.approx(math.exp(-3))
    assert not any("temperature" in name for name in fixed(batch, fixed.draw(keys(ALL))))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"regions": 0}, "regions must"),
        ({"region_temperature": 0.001}, "region_temperature"),
        ({"filter_threshold": 1.5}, "filter_threshold"),
        ({"region_weight": -1.0}, "region_weight"),
        ({"grounding_eps": 0.0}, "grounding_eps"),
        ({"prompter": "roi"}, "--cloc.no-grounding"),
        ({"prompter": "both"}, "prompter must be one of"),
        ({"box_frequencies": (4.0, 2.0)}, "box_frequencies"),
        ({"min_shown": 0.0}, "min_shown"),
        ({"min_side": 0.0}, "min_side"),
        ({"roi_size": 0}, "roi_size"),
        ({"crop": "squash"}, "crop must be one of"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_impossible_settings_are_refused(fields, told):
    with pytest.raises(UserError, match=told):
        ClocConfig(**fields)


@pytest.fixture(scope="module")
def of_two_ranks(text, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.methods.region_ranks", str(folder), text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ["default", "roi"])
def test_two_ranks_under_ddp_have_the_loss_and_the_gradients_of_one(text, of_two_ranks, name):
    method = make(text, **CHOICES[name])
    told = method(batch_of(ALL), method.draw(keys(ALL)))
    expected = gradients(method, told["loss"])
    for found in of_two_ranks:
        assert_alike(found[name]["gradients"], expected)
    for part in ("loss", "clip", "region", "region_weight", "grounding", "regions"):
        if part in told:
            mean = sum(found[name]["told"][part] for found in of_two_ranks) / 2
            assert mean.item() == pytest.approx(told[part].item(), rel=1e-9), part


def test_a_rank_whose_images_have_no_region_does_not_stall_the_other(text, of_two_ranks):
    method = make(text)
    rows = [0, 1, 4, 6, 2, 3, 5, 5]
    expected = gradients(method, method(batch_of(rows), method.draw(keys(rows)))["loss"])
    for found in of_two_ranks:
        assert_alike(found["uneven"]["gradients"], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["default", "cross", "roi"])
def test_a_gpu_has_the_loss_and_the_gradients_of_the_cpu_and_waits_for_nothing(text, name):
    method = make(text, **CHOICES[name])
    draw = method.draw(keys(ALL))
    expected = gradients(method, method(batch_of(ALL), draw)["loss"])
    method = method.float().cuda()
    batch = batch_of(ALL)
    batch["views"]["image"] = batch["views"]["image"].float().cuda()
    method(batch, draw)["loss"].backward()  # kernels are compiled
    method.zero_grad(set_to_none=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        method(batch, draw)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for weight, parameter in method.named_parameters():
        if parameter.requires_grad:
            apart = (parameter.grad.double().cpu() - expected[weight]).norm()
            assert apart <= 1e-3 * expected[weight].norm() + 1e-5, weight  # fp32, a network deep
