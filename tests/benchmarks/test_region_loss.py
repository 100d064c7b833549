import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import _region_check
import _region_plot
import pytest
import region_loss
import report
import torch
from _region_check import Inputs, Judge, Shape
from _region_targets import targets
from _results import Measurement, Row
from baselines import contrastive as baselines

from locfast.kernels.region_contrastive_loss import region_contrastive_loss

CPU = torch.device("cpu")
SHAPE = Shape(200, 64)


def test_the_whole_script_runs_on_a_cpu_and_writes_its_table(tmp_path):
    script = os.path.relpath(region_loss.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    options = ["--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, script, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "cpu" / "region_loss.json").read_text())
    assert result["smoke"] and set(result["sources"]) == {"region_contrastive_loss"}
    notes = {row["who"]: row["note"] for row in result["rows"] if row["case"] == "all"}
    assert "needs a CUDA device" in notes.pop("locfast triton")
    if notes:  # where it is installed, it is measured
        assert notes == {"open_clip": "not installed"}
    measured = [row for row in result["rows"] if row["case"] != "all"]
    assert all(row["ms"] is not None for row in measured), [row["note"] for row in measured]
    timed = {(row["case"], row["who"], row["direction"]) for row in measured if row["who"] != "open_clip"}
    assert timed == {
        (shape.name, who, direction)
        for shape in region_loss.SMOKE
        for who in ("locfast tiled", "locfast reference", "eager", "torch.compile")
        for direction in ("forward", "both")
    }
    assert {row["shape"]["R"] for row in measured} == {64, 200}
    assert "targets of the design" in done.stdout


@pytest.mark.parametrize(
    ("threshold", "forward", "both"),
    [(0.9, 4, 10), (None, 2, 8)],
)
def test_flops_are_those_of_the_products_that_the_loss_needs(threshold, forward, both):
    shape = Shape(32768, 768, threshold=threshold)
    assert shape.flops("forward") == forward * 32768**2 * 768
    assert shape.flops("both") == both * 32768**2 * 768


def test_one_caption_in_64_is_nearly_another_and_no_other_pair_is_near_the_threshold():
    texts = torch.nn.functional.normalize(Inputs(Shape(1024, 512), CPU).plain[1].double(), dim=-1)
    cosines = (texts @ texts.T).fill_diagonal_(0)
    near = cosines > 0.9
    assert near.sum() == 2 * 1024 // 64
    assert cosines[near].min() > 0.98 and cosines[~near].max() < 0.5


def ours(backend: str = "tiled", **changed: object):
    def loss(regions, texts, scale, threshold):
        options = {"logit_scale": scale, "filter_threshold": threshold, "backend": backend} | changed
        return region_contrastive_loss(regions, texts, **options)

    return loss


@pytest.fixture(scope="module", params=[SHAPE, Shape(200, 64, 20.0, None)], ids=lambda shape: shape.name)
def judge(request) -> Judge:
    return Judge(Inputs(request.param, CPU))


@pytest.fixture(scope="module")
def filtered() -> Judge:
    return Judge(Inputs(SHAPE, CPU))


def test_right_results_pass_and_have_no_note(judge):
    for loss in (ours("tiled"), ours("reference")):
        judge.ours((judge.inputs.forward(loss),))
        judge.ours(judge.inputs.both(loss))
    assert judge.peer(judge.inputs.both(baselines.materialised)) == ""


def test_the_truth_is_the_reference_in_fp64(judge):
    truth = [right[1] for right in judge.right]
    regions, texts, scale = (x.detach().double().requires_grad_() for x in judge.inputs.plain)
    loss = ours("reference")(regions, texts, scale, judge.inputs.threshold)
    gradients = torch.autograd.grad(loss, (scale, regions, texts))
    for found, wanted in zip(truth, (loss.detach(), *gradients), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-15)


def test_a_truth_that_is_not_the_references_is_told(monkeypatch):
    def unfiltered(*embeddings, **options):
        return region_contrastive_loss(*embeddings, **options | {"filter_threshold": None})

    monkeypatch.setattr(_region_check, "region_contrastive_loss", unfiltered)
    with pytest.raises(AssertionError, match="truth is not the reference's: loss"):
        _ = Judge(Inputs(SHAPE, CPU)).right


def test_rows_of_many_regions_are_a_sample_over_all_of_them(monkeypatch):
    inputs = Inputs(SHAPE, CPU)
    all_rows = Judge(inputs).right
    monkeypatch.setattr(_region_check, "WHOLE", 100)
    monkeypatch.setattr(_region_check, "SOME", 50)
    monkeypatch.setattr(_region_check, "PANEL", 1000)
    some = Judge(inputs)
    assert len(some.rows) == 50 and torch.equal(some.rows // 4, torch.arange(50))
    for (_, found), (_, wanted) in zip(some.right, all_rows, strict=True):
        wanted = wanted[some.rows] if wanted.ndim else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-18)
    some.ours(inputs.both(ours()))


def test_a_loss_that_keeps_near_duplicates_is_refused(filtered):
    unfiltered = ours(filter_threshold=None)
    with pytest.raises(AssertionError, match="loss"):
        filtered.ours((filtered.inputs.forward(unfiltered),))
    row = region_loss.Contender("locfast tiled", unfiltered)
    assert refusal(row).startswith("refused, result is wrong: loss")


def test_a_gradient_that_lacks_one_pair_is_refused(filtered):
    loss, regions, texts, scale = filtered.inputs.both(ours())
    wrong = texts.clone()
    wrong[-1] *= 1.1
    with pytest.raises(AssertionError, match=r"texts\.grad"):
        filtered.ours((loss, regions, wrong, scale))
    with pytest.raises(AssertionError, match=r"logit_scale\.grad"):
        filtered.ours((loss, regions, texts, scale * 1.01))


def refusal(one: region_loss.Contender) -> str:
    """The note of a row."""

    class Bench:
        note = ""

        def measure(self, case, direction, who, run, check, **others):
            try:
                self.note = check()
            except AssertionError as error:
                self.note = f"refused, result is wrong: {error}"

    bench = Bench()
    region_loss.run_row(bench, region_loss.Case(SHAPE, CPU), "both", one)
    return bench.note


def test_a_peer_that_is_less_exact_is_timed_and_one_that_computes_something_else_is_not():
    def rounded(regions, texts, scale, threshold):
        return baselines.materialised(regions, texts, scale, threshold).bfloat16()

    peer = baselines.Peer("a peer", lambda: rounded)
    assert "less exact: relative L2 error" in refusal(region_loss.Contender("a peer", rounded, peer))

    def twice(*inputs):
        return 2 * baselines.materialised(*inputs)

    assert "refused" in refusal(region_loss.Contender("a peer", twice, peer))


def test_a_mean_that_is_right_by_luck_leaves_room_for_one_that_is_not():
    same = truth = torch.tensor(5.0, dtype=torch.float64)
    room = _region_check._forced(same, truth, torch.full((100,), 0.01), 400) - truth
    assert room.item() == pytest.approx(0.01 / 20, rel=1e-3)


def test_what_decides_the_target_is_measured_first_and_everything_is_measured_with_all():
    contenders = [region_loss.Contender(f"locfast {name}", ours()) for name in region_loss.BACKENDS]
    contenders += [region_loss.Contender(peer.name, ours(), peer) for peer in baselines.PEERS]
    usual = region_loss.in_order_of_worth(region_loss.CASES, contenders, everything=False)
    assert (usual[0][0], usual[0][1].name) == (Shape(32768, 768), "locfast triton")
    assert {shape for shape, one in usual if one.name == "locfast triton"} == set(region_loss.CASES)
    assert {one.name for _, one in usual} == {one.name for one in contenders}
    whole = region_loss.in_order_of_worth(region_loss.CASES, contenders, everything=True)
    pairs = {(shape, one.name) for shape, one in whole}
    assert len(pairs) == len(whole) and pairs > {(shape, one.name) for shape, one in usual}
    assert all(shape.threshold is None for shape, name in pairs if name == "open_clip")
    assert len(pairs) == 5 * len(region_loss.CASES) + len(region_loss.REGIONS)


def test_what_cannot_be_measured_is_told_in_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["region_loss.py", "--device", "cpu", "--out", str(tmp_path), "--cases", "nosuch"])
    with pytest.raises(SystemExit, match="2"):
        region_loss.main()
    assert "nothing to measure" in capsys.readouterr().err


def row(who: str, regions: int, rate: float | None = 410.0, peak: float | None = 600.0, shape: Shape = SHAPE) -> Row:
    shape = Shape(regions, 768, shape.scale, shape.threshold)
    return Row(shape.name, "both", who, rate and 20.0, 19.0, 21.0, rate, "TFLOP/s", 50.0, peak, shape=shape.letters)


def mib(regions: int, each: float) -> float:
    """Peak of one bit a pair and so many bytes for each number of the embeddings."""
    return (regions**2 / 8 + each * regions * 768) / 2**20


def test_the_target_is_held_against_triton_at_its_shape_alone():
    rows = [row("locfast triton", 32768, 399.0), row("locfast tiled", 32768, 500.0), row("eager", 32768, 600.0)]
    rows += [row("locfast triton", 32768, 700.0, shape=Shape(1, 768, threshold=None)), row("locfast triton", 65536)]
    speed, memory = targets(rows)
    assert (speed.measured, speed.verdict, memory.verdict) == ("399 TFLOP/s", "not met", "not compared")
    assert targets([row("locfast triton", 32768, 401.0)])[0].verdict == "met"
    assert targets([row("locfast triton", 32768, None), row("eager", 32768)]) == []


@pytest.mark.parametrize(("many", "verdict"), [(12.5, "met"), (14.0, "not met"), (48.0, "not met")])
def test_memory_beyond_one_bit_a_pair_grows_with_the_embeddings_alone(many, verdict):
    rows = [row("locfast triton", 32768, peak=mib(32768, 12.0)), row("locfast triton", 131072, peak=mib(131072, many))]
    memory = targets(rows)[1]
    assert (memory.measured, memory.verdict) == (f"12.0 to {many:.1f}", verdict)


def test_chart_shows_memory_of_the_usual_case_against_regions(tmp_path):
    rows = [row("eager", 1024, peak=16.0), row("eager", 4096, peak=250.0), row("eager", 131072, None, None)]
    rows += [row("eager", 8192, shape=Shape(1, 768, threshold=None)), row("eager", 8192, shape=Shape(1, 768, 20.0))]
    rows += [row("locfast triton", 4096, peak=30.0), row("locfast triton gradients:64x128", 4096, peak=30.0)]
    assert _region_plot.curves(rows, "both") == {
        "eager": [(1024, 16.0), (4096, 250.0)],
        "locfast triton": [(4096, 30.0)],
    }
    assert _region_plot.write(rows, tmp_path / "chart.svg")
    drawn = ElementTree.parse(tmp_path / "chart.svg").getroot()
    assert "memory against regions" in drawn.attrib["aria-label"]
    assert "regions" in [part.text for part in drawn.iter()]
    assert not _region_plot.write([row("eager", 1024, peak=None)], tmp_path / "empty.svg")


def test_page_shows_targets_and_says_what_is_drawn(tmp_path):
    rows = [row("locfast triton", 32768)]
    found = Measurement("region_loss", {"gpu": "NVIDIA H200"}, {}, "0123456789ab", False, "2026-01-02", rows=rows)
    found.write(tmp_path).with_suffix(".svg").write_text("<svg/>")
    page = report.render(tmp_path)
    assert "![region_loss: memory against regions]" in page
    assert "| forward and backward at R 32768, E 768 | 400 TFLOP/s | 410 TFLOP/s | met |" in page
