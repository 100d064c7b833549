"""LUT's demo, small: LUT and MAE for the same time, and figures of both."""

import json

import pytest

from locfast.cli import parse_train
from locfast.demo.lut import Settings, run_demo, without_context
from locfast.demo.run import DemoProbe
from locfast.errors import UserError
from locfast.eval.probe import ProbeConfig
from tests.report.pages import check_page

HEADS = ProbeConfig(heads=("linear",), max_epochs=1)
TINY = Settings(timed_steps=1, probe=DemoProbe(train=32, validation=16, test=16, heads=HEADS))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lut"
    return run_demo(parse_train(["--method", "lut", "--steps", "3", "--batch-size", "8", "--out", str(out)]), TINY)


def test_no_flag_means_the_demo_of_the_method() -> None:
    config = parse_train(["--method", "lut"])
    assert (config.model, config.data, config.lut.decoder_width) == ("demo", "demo", 96)


def test_mae_gets_as_many_steps_as_fit_into_the_time_of_lut(run) -> None:
    told = json.loads((run / "demo.json").read_text())
    assert told["steps"] == {"lut": 3, "mae": round(3 * told["step_of_lut_over_mae"])}
    assert told["step_of_lut_over_mae"] > 1  # the same work and a momentum encoder's
    assert "context_weight: 0.0" in (run / "mae/config.yaml").read_text()


def test_a_run_holds_its_figures(run) -> None:
    told = json.loads((run / "demo.json").read_text())
    assert told["columns"] == ["MAE", "LUT", "random weights"]
    assert [figure["name"] for figure in told["figures"]] == [
        "local recall, linear head",
        "image-level recall, linear head",
    ]
    assert all(0 <= figure[side] <= 100 for figure in told["figures"] for side in ("baseline", "ours", "teacher"))
    check_page((run / "report.html").read_text())


def test_the_baseline_is_the_same_run_but_for_the_context() -> None:
    config = parse_train(["--method", "lut", "--seed", "3"])
    plain = without_context(config)
    assert (plain.seed, plain.steps, plain.lut.context_weight, config.lut.context_weight) == (3, config.steps, 0, 1.0)


def test_a_run_that_is_there_is_not_touched(run) -> None:
    with pytest.raises(UserError, match="a run is already there"):
        run_demo(parse_train(["--method", "lut", "--out", str(run)]), TINY)
