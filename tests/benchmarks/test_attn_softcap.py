import argparse
import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import _plot
import attn_softcap
import pytest
import torch
from _attention_check import Inputs, Judge, Shape
from _attention_targets import targets
from _results import Row
from baselines import attention as baselines
from baselines._library import NotInstalledError, library

from locfast.kernels.softcap_attention import softcap_attention

CPU = torch.device("cpu")
SHAPE = Shape(batch=3, heads=2, tokens=20, head_dim=16)


def test_the_whole_script_runs_on_a_cpu_and_writes_its_table_and_its_chart(tmp_path):
    script = os.path.relpath(attn_softcap.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    options = ["--device", "cpu", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, script, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "cpu" / "attn_softcap.json").read_text())
    assert result["smoke"] and result["command"].endswith("--device cpu --smoke")
    assert not [row for row in result["rows"] if "refused" in row["note"]]
    timed = {(row["who"], row["direction"]) for row in result["rows"] if row["ms"] is not None}
    whole = ("locfast tiled", "locfast reference", "eager", "eager compiled", "sdpa flash, no cap", "sdpa math, no cap")
    timed -= {("locfast cuda", "forward"), ("locfast cuda", "backward")}  # there where locfast/_C.so was built
    assert timed == {(who, direction) for who in whole for direction in ("forward", "backward")} | {
        ("flex exact", "forward"),
        ("flex approx", "forward"),
    }
    notes = {row["who"]: row["note"] for row in result["rows"] if row["case"] == "all"}
    assert "needs a CUDA device" in notes["locfast triton"]
    assert set(notes) >= {"flash-attn 2", "flash-attn 3", "flash-attn 4", "xformers, no cap", "sdpa cudnn, no cap"}
    ElementTree.parse(tmp_path / "cpu" / "attn_softcap.svg")
    assert "targets of the design" in done.stdout


def test_what_decides_a_target_is_measured_first():
    contenders = [attn_softcap.Contender(name, right) for name in ("locfast triton", "flex exact", "eager")]
    steps = attn_softcap.in_order_of_worth([*attn_softcap.CASES, *attn_softcap.SWEEP], contenders)
    shapes = [attn_softcap.CASES[name] for name, _ in steps[:4]]
    assert [(shape.tokens, shape.head_dim) for shape in shapes] == [(577, 64), (197, 64), (729, 72), (257, 64)]
    assert all([one.name for one in who] == ["locfast triton", "flex exact"] for _, who in steps[:4])
    measured = [(name, one.name) for name, who in steps for one in who]
    assert len(set(measured)) == len(measured)
    assert set(measured) >= {(case, one.name) for case in attn_softcap.CASES for one in contenders}


def test_every_form_that_is_asked_for_holds_while_its_row_is_measured_and_no_longer():
    pytest.importorskip("triton")
    from locfast.kernels.softcap_attention import triton

    def state():
        return triton.tiles("forward", 64, torch.bfloat16, 577, 90)

    default = state()
    asked = attn_softcap.tiles_option("forward:32x32x4x1")
    found = attn_softcap.ours(torch.device("cuda"), [asked])
    held = {}
    for one in found:
        with one.setting():
            held[one.name] = state()
    assert {name: now for name, now in held.items() if now != default} == {
        "locfast triton, forward:32x32x4x1": triton.Tiles(32, 32, 4, 1)
    }
    assert state() == default


@pytest.mark.parametrize("text", ["forwards:32x32x4x1", "forward:32x32", "forward", "forward:axbxcxd"])
def test_tiles_that_make_no_sense_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="want e.g. forward:128x64x8x3"):
        attn_softcap.tiles_option(text)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(SHAPE, torch.bfloat16, CPU, softcap=30.0, scale=0.25)


def right(q, k, v):
    return softcap_attention(q, k, v, softcap=30.0, scale=0.25, backend="tiled")


def test_right_results_pass_and_have_no_note(judge):
    for backward in (False, True):
        judge.ours(right, backward)
        assert judge.peer(right, backward, capped=True) == ""


def test_a_wrong_image_at_the_end_of_the_batch_is_seen(judge):
    def wrong(q, k, v):
        out = right(q, k, v)
        return torch.cat([out[:-1], out[-1:] * 1.05])

    with pytest.raises(AssertionError, match="output"):
        judge.ours(wrong, False)


def test_a_lost_gradient_is_seen(judge):
    with pytest.raises(AssertionError, match=r"v\.grad"):
        judge.ours(lambda q, k, v: right(q, k, v.detach()) + 0 * v, True)


def test_a_peer_that_rounds_its_logits_is_timed_and_its_row_says_what_that_costs(judge):
    note = judge.peer(lambda q, k, v: baselines.eager(q, k, v, 30.0, 0.25), True, capped=True)
    assert "less exact: relative L2 error" in note and "rounding alone costs" in note
    with pytest.raises(AssertionError):
        judge.ours(lambda q, k, v: baselines.eager(q, k, v, 30.0, 0.25), True)


def test_a_peer_that_computes_something_else_is_not_timed(judge):
    plain = baselines.load_sdpa(baselines.SDPBackend.MATH)
    assert judge.peer(lambda q, k, v: plain(q, k, v, 30.0, 0.25), True, capped=False) == ""
    with pytest.raises(AssertionError, match="relative L2 error"):
        judge.peer(lambda q, k, v: 2 * plain(q, k, v, 30.0, 0.25), True, capped=False)
    with pytest.raises(AssertionError, match="relative L2 error inf"):
        judge.peer(lambda q, k, v: q * torch.nan, False, capped=True)


def test_inputs_are_slices_of_one_packed_projection_whose_logits_have_the_deviation_asked_for():
    inputs = Inputs(Shape(4, 4, 64, 32), torch.float32, CPU, deviation=7.0)
    q, k, _ = inputs.plain
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and q.stride(-1) == 1
    assert (q @ k.transpose(-2, -1) * 32**-0.5).std().item() == pytest.approx(7.0, rel=0.1)


def test_the_approximate_tanh_keeps_itself_under_derivatives_and_batching():
    tanh = baselines._approximate_tanh()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tanh, (x,))
    graph = torch.fx.experimental.proxy_tensor.make_fx(torch.func.vmap(tanh))(x.detach())
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.locfast_benchmarks.tanh_approx.default
    ]


def test_what_is_not_installed_differs_from_what_does_not_load(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_there.py").write_text("import its_missing_half")
    with pytest.raises(NotInstalledError, match="nowhere_at_all"):
        library("nowhere_at_all.sub")
    with pytest.raises(ModuleNotFoundError, match="its_missing_half"):
        library("half_there")


def row(who: str, ms: float | None, direction: str = "forward", tokens: int = 577, dtype: str = "bf16") -> Row:
    shape = {"B": 64, "H": 16, "T": tokens, "D": 72 if tokens == 729 else 64}
    return Row(f"a case, {dtype}", direction, who, ms, ms, ms, shape=shape)


def verdicts(rows: list[Row]) -> dict[str, tuple[float | None, str]]:
    return {one.peer: (one.measured, one.verdict) for one in targets(rows)}


def test_targets_are_ratios_of_measured_rows_and_nothing_else():
    rows = [row("locfast triton", 2.0), row("locfast cuda", 1.0), row("flex exact", 1.2), row("flash-attn 3", 1.3)]
    rows += [row("sdpa flash, no cap", 1.5), row("sdpa cudnn, no cap", 1.1), row("flash-attn 2", None)]
    assert verdicts(rows) == {
        "flex exact": (pytest.approx(1.2), "not met"),
        "sdpa cudnn, no cap": (pytest.approx(1.1), "met"),
        "flash-attn 2": (None, "not compared"),
        "flash-attn 3": (pytest.approx(1.3), "met"),
        "flash-attn 4": (None, "not compared"),
    }
    assert {one.ours for one in targets(rows)} == {"locfast cuda"}


def test_a_backward_is_held_against_the_fastest_of_all():
    rows = [row("locfast triton", 1.0, "backward"), row("flex exact", 3.0, "backward")]
    assert verdicts(rows) == {"flex exact": (pytest.approx(3.0), "met")}
    rows.append(row("sdpa flash, no cap", 1.05, "backward"))
    assert verdicts(rows) == {"sdpa flash, no cap": (pytest.approx(1.05), "not met")}


def test_wider_heads_have_their_own_factors():
    rows = [row("locfast triton", 1.0, tokens=729), row("flash-attn 4", 1.0, tokens=729)]
    assert verdicts(rows)["flash-attn 4"] == (1.0, "met")


def test_no_target_is_decided_by_other_dtypes_or_variants():
    assert targets([row("locfast triton", 1.0, dtype="fp16"), row("flex exact", 2.0, dtype="fp16")]) == []
    (one, *_) = targets([row("locfast triton, forward:32x32x4x1", 1.0), row("flex exact", 2.0)])
    assert one.verdict == "not compared"


def test_chart_shows_time_per_head_of_an_image(tmp_path):
    rows = [row("eager", 1.024), row("eager", 2.048, tokens=1025), row("late", None), row("wide", 1.0, tokens=729)]
    assert _plot.curves(rows, "forward", 64) == {"eager": [(577, pytest.approx(1.0)), (1025, pytest.approx(2.0))]}
    assert _plot.write(rows, tmp_path / "chart.svg")
    drawn = ElementTree.parse(tmp_path / "chart.svg").getroot()
    assert len([part for part in drawn.iter() if part.tag.endswith("polyline")]) == 1
    assert not _plot.write([row("late", None)], tmp_path / "empty.svg")
    assert not (tmp_path / "empty.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--softcap", "-3"], "--softcap -3"),
        (["--only", "nosuch"], "--only nosuch"),
        (["--cases", "nosuch"], "--cases nosuch"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_message(arguments, told, tmp_path, monkeypatch, capsys):
    options = ["attn_softcap.py", "--device", "cpu", "--smoke", "--out", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", options)
    with pytest.raises(SystemExit, match="2"):
        attn_softcap.main()
    assert told in capsys.readouterr().err


def test_a_tile_is_compiled_with_its_backward_and_one_that_cannot_be_stops_nothing(monkeypatch):
    triton = pytest.importorskip("locfast.kernels.softcap_attention.triton")
    launched = []
    for name in ("softcap_attention", "softcap_attention_backward"):
        launch = getattr(triton, name)

        def watched(*args, launch=launch, name=name):
            result = launch(*args)
            launched.append((name, attn_softcap.tiles_override["forward"].own))
            return result

        monkeypatch.setattr(triton, name, watched)
    for text in ("forward:3x5x4x1", "forward:32x32x4x1"):  # Triton has no tile of 3 rows
        attn_softcap._compile((SHAPE, torch.float32, "cpu", 30.0, attn_softcap.tiles_option(text)[1]))
    assert launched == [("softcap_attention", 32)] * 2 + [("softcap_attention_backward", 32)]
    assert attn_softcap.tiles_override == {}
