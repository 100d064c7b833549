"""The shares of pre-training: relations that must hold, and nothing typed in."""

from __future__ import annotations

import re
import sys

import _claim_plot
import compute_claim
import pytest
from _claim_page import verdict
from _pretraining import B16, CLIP_EPOCHS, L14, L14_336, PAIRS, PRETRAINING, SIGLIP_B16, SO400M
from _results import Measurement, Row
from _step_flops import forward_flops
from compute_claim import Claim, Run, claims, gpu_hours, measured

from locfast.config.files import read_recipe, recipe_names


@pytest.fixture(scope="module")
def found() -> dict[str, Claim]:
    return {claim.name: claim for claim in claims()}


@pytest.fixture(scope="module")
def clip(found) -> Claim:
    return found["clip_b16"]


def test_every_recipe_of_the_paper_has_its_pretraining():
    assert set(PRETRAINING) == {name for name in recipe_names() if read_recipe(name)["method"] == "maskembed"} - {
        "demo"
    }


def test_every_constant_has_a_source_and_whether_it_was_read():
    facts = [fact for accounts in PRETRAINING.values() for account in accounts for fact in account.facts]
    assert all(fact.value > 0 and len(fact.what) > 3 and len(fact.source) > 3 for fact in facts)
    assert {fact.how for fact in facts} == {"read", "quoted"}
    assert all(stage.samples for accounts in PRETRAINING.values() for account in accounts for stage in account.stages)


def test_published_towers_have_the_flops_of_our_shapes(found):
    """open_clip counts a few small layers that we leave out; its SigLIP towers hold the pooling, 0.7 to 1.4 %."""
    for name, published, tolerance in (
        ("clip_b16", B16, 1e-3),
        ("clip_l14", L14, 1e-3),
        ("clip_l14_336", L14_336, 1e-3),
        ("siglip_b16 at 40B samples", SIGLIP_B16, 1.5e-2),
        ("siglip_so400m_224 at 40B samples", SO400M, 1e-2),
    ):
        assert forward_flops(found[name].run.shape) == pytest.approx(published.value, rel=tolerance), name


def test_samples_stay_below_one_percent_for_clip_and_siglip(found):
    shares = [claim.samples for claim in found.values() if claim.is_of_the_paper]
    assert len(shares) == 9
    assert all(0.001 < share < 0.006 for share in shares)


def test_share_of_samples_is_images_over_pairs(clip):
    assert clip.samples == clip.steps * 1024 / (PAIRS.value * CLIP_EPOCHS.value)


def test_flops_do_not_always_stay_below_one_percent(found, clip):
    """A tie for CLIP B/16, two per cent for L/14@336, and one or two for SO400M@384 by what SigLIP saw."""
    assert clip.flops("baseline") == pytest.approx(0.01, rel=0.02)
    assert 0.02 < found["clip_l14_336"].flops() < 0.022
    low, high = (found[f"siglip_so400m_384 at {samples} samples"].flops() for samples in ("40B", "18B"))
    assert low < 0.01 < 0.02 < high < 0.022


def test_locfasts_way_is_the_smaller_and_fp8_smaller_still(found):
    for claim in found.values():
        assert claim.flops("baseline") > claim.flops() > claim.flops(fp8_teacher=True) > 0.5 * claim.flops()


def test_sharing_leaves_98_to_99_percent_of_the_public_way(found):
    for name in ("clip_b16", "clip_l14_336", "siglip_so400m_384 at 40B samples"):
        run = found[name].run
        assert round(run.flops("locfast") / run.flops("baseline"), 2) in (0.98, 0.99), name


def test_most_steps_is_the_last_number_below_one_percent(found):
    for claim in found.values():
        at, beyond = (Claim(claim.run, claim.before, claim.most_steps + more).flops() for more in (0, 1))
        assert at < 0.01 <= beyond


def test_fp8_halves_the_teachers_linear_layers_and_nothing_else(clip):
    saved = clip.run.flops("locfast") - clip.run.flops("locfast", fp8_teacher=True)
    teacher = clip.run.parts("locfast")["teacher"] * clip.run.batch
    assert 0.4 * teacher < saved < 0.5 * teacher


def test_page_and_picture_show_the_claims_as_they_are(found):
    page, picture = compute_claim.render(list(found.values()))
    assert compute_claim.PAGE.read_text() == page, "run python benchmarks/compute_claim.py"
    assert compute_claim.PICTURE.read_text() == picture, "run python benchmarks/compute_claim.py"
    assert all(name in page and f">{name}<" in picture for name in found)


def test_page_opens_with_what_holds_and_what_does_not(found):
    told = " ".join("\n".join(verdict(list(found.values()))).split())
    fails = re.search(r"It fails for (.*?)\. It holds", told)
    assert fails and "clip_l14_336" in fails[1] and "clip_b16" not in fails[1]
    assert told.index("In samples that holds") < told.index("In FLOPs it does not always hold")


def step_json(folder, *rows: Row, smoke: bool = False) -> None:
    machine = {"gpu": "NVIDIA H200"}
    Measurement("step", machine, {}, "0", False, "2026-01-02", rows=list(rows), smoke=smoke).write(folder)


def test_gpu_hours_are_images_over_the_measured_rate(clip, tmp_path):
    step_json(
        tmp_path,
        Row("clip_b16, bf16", "step", "locfast", ms=128.0, shape={"B": 256}),
        Row("clip_b16, bf16", "step", "public code", ms=256.0, shape={"B": 256}),
        Row("clip_l14, bf16", "step", "locfast", ms=320.0, shape={"B": 128}),
        Row("clip_b16, bf16", "step", "locfast fp8", ms=102.4, shape={"B": 256}),
        Row("clip_b16, teacher alone", "forward", "locfast", rate=500.0, unit="TFLOP/s"),
        Row("clip_b16, B 512", "both", "locfast", note="did not run: out of memory"),
    )
    told = list(measured(clip.run, tmp_path))
    assert told == [("NVIDIA H200", "locfast", 2000.0), ("NVIDIA H200", "locfast fp8", 2500.0)]
    hours = clip.steps * 1024 / 2000 / 3600
    assert gpu_hours(clip, tmp_path).startswith(f"{hours:.0f} (NVIDIA H200, locfast)")


def test_without_a_measurement_there_are_no_gpu_hours(clip, tmp_path):
    step_json(tmp_path, Row("clip_b16", "step", "locfast", ms=9.0, shape={"B": 1}), smoke=True)
    assert gpu_hours(clip, tmp_path) == gpu_hours(clip, tmp_path / "empty") == "not measured"


@pytest.fixture
def few(monkeypatch, clip, tmp_path):
    """A table of one line, and a page that lies elsewhere."""
    monkeypatch.setattr(compute_claim, "ROOT", tmp_path)
    monkeypatch.setattr(compute_claim, "PAGE", tmp_path / "compute.md")
    monkeypatch.setattr(compute_claim, "PICTURE", tmp_path / "compute.svg")
    monkeypatch.setattr(compute_claim, "claims", lambda steps=60_000: [Claim(clip.run, clip.before, steps)])
    monkeypatch.setattr(compute_claim._claim_page, "short_runs", lambda claims: [])

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["compute_claim.py", *arguments])
        compute_claim.main()

    return run


def test_check_changes_nothing_and_tells_a_page_that_is_out_of_date(few, tmp_path, capsys):
    with pytest.raises(SystemExit, match="is out of date: run python benchmarks/compute_claim.py"):
        few("--check")
    assert not list(tmp_path.iterdir())
    few()
    assert "| clip_b16 |" in capsys.readouterr().out
    few("--check")
    (tmp_path / "compute.svg").write_text("<svg/>")
    with pytest.raises(SystemExit, match="out of date"):
        few("--check")


def test_other_steps_are_printed_and_not_written(few, tmp_path, capsys):
    few("--steps", "2343")
    assert "at 2,343 steps" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--steps", "7", "--check")])
def test_steps_that_make_no_sense_are_a_mistake_of_the_command_line(few, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        few(*arguments)
    assert "--steps" in capsys.readouterr().err


def test_a_share_beyond_the_pictures_axis_is_refused():
    with pytest.raises(ValueError, match="a share of 40 % lies beyond"):
        _claim_plot.svg([("a recipe", {"samples": 40.0})])


def test_a_name_that_is_no_recipe_is_refused():
    from locfast.errors import UserError

    with pytest.raises(UserError, match="no such recipe"):
        Run.of("clip_b17")
