"""The demo's flow, small: two probes around a training run, and a report that stands alone."""

import json
from dataclasses import replace

import pytest

from locfast.cli import parse_train
from locfast.demo.claim import gains, interval
from locfast.demo.run import DemoProbe, run_demo
from locfast.errors import UserError
from locfast.eval.probe import ProbeConfig
from locfast.report import write_report
from tests.report.pages import check_page

TINY = DemoProbe(train=64, validation=32, test=32, heads=ProbeConfig(max_epochs=1, lr=3e-3))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    return run_demo(parse_train(["--steps", "2", "--batch-size", "8", "--out", str(out)]), TINY)


def test_no_flag_means_the_demo():
    config = parse_train(["--method", "maskembed"])
    assert (config.model, config.data, config.recipe) == ("demo", "demo", None) or config.recipe == "demo"
    assert config.steps is not None


def test_a_run_holds_both_probes_of_all_heads(run):
    found = json.loads((run / "probe.json").read_text())
    heads = {"local/linear", "local/transformer", "global/linear", "global/transformer"}
    assert set(found["before"]) == set(found["after"]) == heads
    assert all(0 <= found[when][name]["recall"] <= 1 for when in ("before", "after") for name in heads)
    assert found["before"] != found["after"]
    assert len(found["pictures"][0]["before"]) == found["grid"][0] * found["grid"][1]


def test_the_report_is_one_file_that_loads_nothing(run):
    page = (run / "report.html").read_text()
    assert page.count("<svg") >= 2 + 2 * 8 and page.count("data:image/png;base64,") == 8
    check_page(page)


def test_the_report_comes_again_from_the_folder(run):
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert write_report(run).read_bytes() == page


def test_a_run_without_a_probe_has_a_report_too(run, tmp_path):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert "<polyline" in write_report(tmp_path).read_text()


def test_kernels_that_cannot_run_are_told_before_the_first_probe(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    arguments = ["--steps", "2", "--device", "cpu", "--kernels", "triton", "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="needs a CUDA device"):
        run_demo(parse_train(arguments), TINY)
    assert not (tmp_path / "run").exists()
    assert "Probing" not in capsys.readouterr().out


def test_no_run_no_report(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path)


def test_a_used_folder_is_refused_before_anything_is_probed(run):
    with pytest.raises(UserError, match="--overwrite"):
        run_demo(replace(parse_train([]), out=str(run)), TINY)


def test_t_interval_by_hand():
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["high"] - 2.0 == pytest.approx(4.3027 / 3**0.5)
    runs = [{"before": {"h": {"recall": b}}, "after": {"h": {"recall": a}}} for b, a in ((0.5, 0.52), (0.6, 0.64))]
    assert gains(runs)["h"]["gain"]["values"] == pytest.approx([2.0, 4.0])
