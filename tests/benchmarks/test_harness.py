import argparse
import importlib
import json
import statistics
import sys
import time

import _harness
import pytest
import torch
from _harness import SMOKE_RESULTS, Bench, command, gpu_times

ARGUMENTS = {"device": "cpu", "budget": float("inf"), "smoke": True}


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench("some_question", ["mask_embeddings"], argparse.Namespace(out=tmp_path, **ARGUMENTS))


def written(bench: Bench) -> dict:
    (path,) = bench.out.glob("cpu/*.json")
    return json.loads(path.read_text())


def test_a_wrong_kernel_is_refused_and_never_run(bench):
    def check():
        raise AssertionError("output: largest error 1, allowed 0.1")

    bench.measure("case", "forward", "wrong", lambda: pytest.fail("it was run"), check, amount=1, unit="GB/s")
    (row,) = written(bench)["rows"]
    assert row["ms"] is None
    assert "refused" in row["note"]
    assert "largest error 1" in row["note"]


def test_a_peer_that_fails_leaves_a_row_and_the_others_go_on(bench):
    def fail():
        raise RuntimeError("no such library")

    bench.measure("case", "forward", "peer", fail, lambda: None, amount=1, unit="GB/s")
    bench.measure("case", "forward", "ours", lambda: None, lambda: None, amount=1, unit="GB/s")
    peer, ours = written(bench)["rows"]
    assert "no such library" in peer["note"]
    assert ours["ms"] >= 0


def test_running_out_of_memory_costs_one_row(bench):
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")

    bench.measure("case", "forward", "reference", fill, lambda: None, amount=1, unit="GB/s")
    bench.measure("case", "forward", "ours", lambda: None, lambda: None, amount=1, unit="GB/s")
    reference, ours = written(bench)["rows"]
    assert reference["note"] == "did not run: out of memory"
    assert ours["ms"] >= 0


def test_what_the_check_says_stands_beside_the_time(bench):
    bench.measure("case", "forward", "peer", lambda: None, lambda: "less exact", amount=1, unit="GB/s")
    (row,) = written(bench)["rows"]
    assert row["ms"] >= 0 and row["note"] == "less exact"


def test_what_is_not_there_has_a_row(bench):
    bench.absent("flash-attn 4", "not installed")
    (row,) = written(bench)["rows"]
    assert (row["who"], row["ms"], row["note"]) == ("flash-attn 4", None, "not installed")


def test_a_smoke_test_stays_out_of_the_results(bench):
    assert bench.result.smoke
    assert Bench("some_question", [], argparse.Namespace(out=None, **ARGUMENTS)).out == SMOKE_RESULTS


def test_command_is_what_to_type_without_where_this_run_wrote(monkeypatch):
    typed = ["/anywhere/benchmarks/x.py", "--only", "locfast", "--out", "/somewhere", "--budget=3", "--smoke"]
    monkeypatch.setattr(sys, "argv", typed)
    assert command() == "python benchmarks/x.py --only locfast --smoke"


def test_a_gpus_time_is_of_the_run_alone_and_behind_a_flush(monkeypatch):
    clock, seen = 0.0, []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock
            seen.append("mark")

        def elapsed_time(self, end):
            return end.at - self.at

    def run():
        nonlocal clock
        clock += 4.0
        seen.append("run")

    monkeypatch.setattr(_harness, "FLUSH_BYTES", 16)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("wait"))
    times = gpu_times(run, torch.device("cpu"))
    assert times == [4.0] * 25
    assert seen[-77:] == ["wait", *["mark", "run", "mark"] * 25, "wait"]


@pytest.mark.gpu
def test_what_the_host_takes_to_launch_is_not_timed():
    x = torch.zeros(16, device="cuda")

    def slow_to_launch():
        end = time.perf_counter() + 2e-4
        while time.perf_counter() < end:
            pass
        x.add_(1)

    assert statistics.median(gpu_times(slow_to_launch, x.device)) < 0.05


def test_rate_is_the_amount_over_the_median(bench):
    x = torch.zeros(1000)
    bench.measure("case", "forward", "ours", lambda: x + 1, lambda: None, amount=8e6, unit="GB/s")
    (row,) = written(bench)["rows"]
    assert row["rate"] == pytest.approx(8e6 / (row["ms"] * 1e-3) / 1e9)
    assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]


@pytest.mark.parametrize(("name", "made_current"), [("cuda", []), ("cuda:1", [1]), ("cpu", [])])
def test_only_a_device_with_a_number_is_made_the_current_one(name, made_current, monkeypatch):
    """PyTorch refuses to make a plain "cuda" current."""
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(device.index))
    assert _harness.use(name).type == name.partition(":")[0]
    assert seen == made_current


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_a_mistake_of_the_command_line(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        _harness.parser(None).parse_args(["--device", name])
    assert f"{name!r} is" in capsys.readouterr().err


def test_rows_are_on_disk_before_the_next_is_measured(bench):
    bench.measure("case", "forward", "first", lambda: None, lambda: None, amount=1, unit="GB/s")
    seen = []
    bench.measure("case", "forward", "second", lambda: seen.append(written(bench)), lambda: None, amount=1, unit="GB/s")
    assert [row["who"] for row in seen[0]["rows"]] == ["first"]


def test_nothing_starts_after_the_budget_and_it_is_listed(bench, capsys):
    bench.deadline = 0
    bench.measure("case", "forward", "late", lambda: pytest.fail("it was run"), lambda: None, amount=1, unit="GB/s")
    bench.finish()
    assert "not reached: case, forward, late" in capsys.readouterr().out


def test_measurement_names_what_it_was_made_on(bench):
    bench.measure("case", "forward", "ours", lambda: None, lambda: None, amount=1, unit="GB/s")
    result = written(bench)
    assert result["machine"]["torch"] == torch.__version__
    assert set(result) >= {"commit", "dirty", "date", "sources", "ceilings", "schema"}
    assert len(result["sources"]["mask_embeddings"]) == 16


@pytest.mark.parametrize("name", ["mask_embeddings", "select_views", "reconstruction_loss"])
def test_benchmarks_of_small_ops_run_as_smoke_tests_on_the_cpu(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cpu", "--out", str(tmp_path)])
    importlib.import_module(name).main()
    rows = json.loads((tmp_path / "cpu" / f"{name}.json").read_text())["rows"]
    eager = [row for row in rows if row["who"] == "eager"]
    assert [row["direction"] for row in eager] == ["forward", "backward"]
    assert all(row["ms"] > 0 for row in eager)
    assert not [row for row in rows if "refused" in row["note"]]
