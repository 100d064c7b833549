import argparse
import json
import sys
from unittest import mock
from xml.etree import ElementTree

import _step_report
import pytest
import step
import torch
from _harness import Bench
from _results import Row
from _step_flops import Shape, step_flops

PARTS = {
    "data",
    "masks",
    "teacher",
    "encoder forward",
    "decoder forward",
    "loss",
    "decoder backward",
    "encoder backward",
    "optimiser",
}


def run(monkeypatch, tmp_path, *arguments: str) -> list[dict]:
    monkeypatch.setattr(
        sys, "argv", ["step.py", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path), *arguments]
    )
    step.main()
    name = "step_fp8" if "--fp8" in arguments else "step"
    return json.loads((tmp_path / "cpu" / f"{name}.json").read_text())["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        return run(patch, tmp_path_factory.mktemp("step"), "--modes", "eager")


def test_both_sides_have_a_step_and_all_its_parts(rows):
    for who in ("locfast", "public code"):
        mine = {row["direction"]: row for row in rows if row["who"] == who}
        assert set(mine) == PARTS | {"step"}, who
        assert all(row["ms"] > 0 for row in mine.values())
        assert "images/s" in mine["step"]["note"]


def test_flops_of_the_parts_add_up_to_the_steps(rows):
    method = step.make(step.SMOKE["tiny"], torch.device("cpu"))
    for who, way in (("locfast", "locfast"), ("public code", "baseline")):
        mine = {row["direction"]: row for row in rows if row["who"] == who}
        done = {part: row["rate"] * row["ms"] * 1e9 for part, row in mine.items() if row["rate"]}
        whole = done.pop("step")
        assert whole == pytest.approx(sum(done.values()))
        assert whole == pytest.approx(sum(step_flops(Shape.of(method), mine["step"]["shape"]["B"], way).values()))


def test_an_fp8_teacher_has_a_table_of_its_own(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path, "--fp8", "--modes", "eager", "--sides", "locfast")
    assert {row["who"] for row in rows} == {"locfast fp8 teacher"}


def test_a_side_that_takes_another_step_is_refused(monkeypatch, tmp_path):
    right = step.public_side

    def wrong(method):
        side = right(method)
        with torch.no_grad():
            side.module.target_scale.mul_(1.1)
        return side

    monkeypatch.setitem(step.SIDES, "public", wrong)
    rows = run(monkeypatch, tmp_path, "--modes", "eager")
    refused = [row for row in rows if row["note"].startswith("did not run: public code: loss is")]
    assert len(refused) == 1 and refused[0]["ms"] is None
    assert not any(row["who"] == "public code" for row in rows)


def test_the_search_ends_where_memory_or_gain_does(monkeypatch, tmp_path):
    arguments = dict(device="cpu", out=tmp_path, smoke=False, budget=float("inf"))
    bench = Bench("step", [], argparse.Namespace(**arguments))
    bench.smoke = False
    case, side = step.Case("", 4), mock.Mock()

    def times(rates):
        def measured(side, method, size, repeats):
            if size not in rates:
                raise torch.OutOfMemoryError
            return [1e3 * size / rates[size]], None

        return measured

    for rates, best in (
        ({4: 10.0, 8: 20.0}, 8),  # memory ends
        ({4: 10.0, 8: 20.0, 16: 20.1, 32: 99.0}, 16),  # the gain does
        ({4: 10.0, 8: 9.0, 16: 99.0}, 4),
    ):
        monkeypatch.setattr(step, "time_steps", times(rates))
        assert step.best_batch(side, None, case, bench) == best
    monkeypatch.setattr(step, "time_steps", times({}))
    with pytest.raises(torch.OutOfMemoryError):
        step.best_batch(side, None, case, bench)


def row(direction: str, ms: float | None, who: str = "locfast", case: str = "clip_b16, bf16, micro-batch 128") -> Row:
    return Row(case, direction, who, ms, ms, ms, 400.0, "TFLOP/s", 50.0, 1.0, "", {"B": 128})


def test_tables_put_target_and_limit_beside_an_h200s_figures():
    measured = [row("step", 69.19), *(row(part, 7.0) for part in _step_report.PARTS), row("data", 1.0)]
    lines = _step_report.tables(measured, "NVIDIA H200", changed=False)
    assert "| 1850 | " in lines[2] and "1850 (100%)" in lines[2] and "3080 (60%)" in lines[2]
    assert lines[-1].count("7.00") == len(_step_report.PARTS)
    assert "1850 (" not in _step_report.tables(measured, "another GPU", changed=False)[2]
    assert "*older kernel*" in _step_report.tables(measured, "NVIDIA H200", changed=True)[2]


def test_a_step_that_did_not_run_says_why():
    failed = Row("clip_b16, bf16", "step", "public", note="did not run: out of memory")
    assert "did not run: out of memory" in _step_report.tables([failed], "NVIDIA H200", changed=False)[2]
    assert _step_report.picture([failed]) is None


def test_picture_has_a_bar_for_every_part_and_is_as_wide_as_its_slowest(tmp_path):
    slow = [row("step", 100.0, "public code"), *(row(part, 14.0, "public code") for part in _step_report.PARTS)]
    fast = [row("step", 50.0), *(row(part, 7.0) for part in _step_report.PARTS)]
    assert _step_report.write_picture([*slow, *fast], tmp_path / "step.svg")
    bars = [e for e in ElementTree.parse(tmp_path / "step.svg").iter() if e.get("height") == str(_step_report.BAR - 8)]
    widths = [float(bar.get("width")) for bar in bars]
    count = len(_step_report.PARTS)
    assert len(widths) == 2 * count
    assert sum(widths[:count]) == pytest.approx(_step_report.LENGTH, abs=1)
    assert sum(widths[count:]) == pytest.approx(_step_report.LENGTH / 2, abs=1)
