"""UTA's demo, small: two students, the same FLOPs, and figures that say what they claim."""

import json

import pytest
import torch
import torch.nn.functional as F

from locfast.cli import parse_train
from locfast.demo.claim import figure_gains
from locfast.demo.run import DemoProbe
from locfast.demo.uta import Settings, class_prototypes, named, run_demo
from locfast.errors import UserError
from locfast.eval.probe import ProbeConfig
from tests.report.pages import check_page

HEADS = ProbeConfig(heads=("linear",), tasks=("local",), max_epochs=1)
TINY = Settings(prototypes=64, test=32, probe=DemoProbe(train=32, validation=16, test=16, heads=HEADS))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uta"
    flags = ["--method", "uta", "--steps", "5", "--batch-size", "8", "--out", str(out)]
    return run_demo(parse_train(flags), TINY)


def test_no_flag_means_the_demo_of_the_method() -> None:
    config = parse_train(["--method", "uta"])
    assert (config.model, config.data, config.uta.teacher) == ("demo", "demo", "demo")
    assert parse_train(["--method", "uta", "--data", "x"]).uta.teacher is None


def test_both_students_spend_the_same_flops(run) -> None:
    told = json.loads((run / "demo.json").read_text())
    assert told["steps"] == {"uta": 5, "mim": round(5 * told["student_flops_of_uta_over_mim"])}
    # 23 of 37 tokens in the blocks and less of attention; MIM projects its 14 hidden patches alone, UTA 23 tokens
    assert 0.60 < told["student_flops_of_uta_over_mim"] < 0.64


def test_a_run_holds_its_figures_and_the_baselines_run(run) -> None:
    told = json.loads((run / "demo.json").read_text())
    names = ["agreement of CLS", "agreement of patches", "zero-shot", "local recall, linear head"]
    assert [figure["name"] for figure in told["figures"]] == names and told["columns"] == ["MIM", "UTA", "teacher"]
    assert told["figures"][0]["teacher"] == pytest.approx(100)
    assert told["figures"][0]["ours"] != told["figures"][0]["baseline"]
    assert "objective: mim" in (run / "mim/config.yaml").read_text()
    check_page((run / "report.html").read_text())


def test_prototypes_name_the_classes_whose_embeddings_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(5, 16, generator=generator), dim=-1)
    labels = torch.arange(5).repeat(20)
    present = F.one_hot(labels, 5).bool()
    prototypes = class_prototypes(centres[labels] * 3 + 0.05 * torch.randn(100, 16, generator=generator), present)
    assert (F.cosine_similarity(prototypes, centres.T, dim=0) > 0.98).all()
    both = torch.zeros(1, 5, dtype=torch.bool)
    both[0, [1, 3]] = True
    assert named((centres[1] + centres[3])[None], prototypes, both) == 1.0
    assert named((centres[1] + centres[4])[None], prototypes, both) == 0.5


def test_a_claim_compares_the_method_with_its_baseline() -> None:
    runs = [
        {"figures": [{"name": "zero-shot", "baseline": 10.0 + i, "ours": 50.0 + 2 * i, "teacher": 90.0}]}
        for i in range(3)
    ]
    found = figure_gains(runs)["zero-shot"]
    assert (found["baseline"], found["ours"], found["teacher"], found["gain"]["mean"]) == (11.0, 52.0, 90.0, 41.0)
    assert found["gain"]["low"] == pytest.approx(41 - 4.3027 / 3**0.5, abs=1e-3)


def test_what_a_demo_of_two_runs_cannot_do_is_told(run, monkeypatch) -> None:
    with pytest.raises(UserError, match="it cannot go on half-way"):
        run_demo(parse_train(["--method", "uta", "--resume", "--out", str(run)]), TINY)
    with pytest.raises(UserError, match="a run is already there"):
        run_demo(parse_train(["--method", "uta", "--out", str(run)]), TINY)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        run_demo(parse_train(["--method", "uta", "--out", str(run / "new")]), TINY)
