import json

import pytest
import report
import suite
from _results import Measurement, Row, commit, slug, sources_hash


@pytest.fixture
def measurement() -> Measurement:
    return Measurement(
        benchmark="mask_embeddings",
        machine={"gpu": "NVIDIA H200", "torch": "2.15.0"},
        sources={"mask_embeddings": sources_hash("mask_embeddings")},
        commit="0123456789abcdef",
        dirty=False,
        date="2026-01-02T03:04:05+00:00",
        ceilings={"GB/s": 4300.0},
        rows=[
            Row("a case", "forward", "locfast triton", 0.5, 0.4, 0.6, 4000.0, "GB/s", 93.0, 12.0),
            Row("a case", "forward", "eager", note="did not run: no reason"),
        ],
    )


def test_performance_page_shows_the_results_as_they_are():
    assert report.PAGE.read_text() == report.render(), "run python benchmarks/report.py"


def test_page_without_results_says_so_and_holds_no_figure(tmp_path):
    page = report.render(tmp_path)
    assert "Not measured yet" in page
    assert "GB/s" not in page and " MiB |" not in page


def test_a_measurement_survives_the_way_to_disk_and_the_page(measurement, tmp_path):
    path = measurement.write(tmp_path)
    assert path == tmp_path / "nvidia-h200" / "mask_embeddings.json"
    assert Measurement.read(path) == measurement
    page = report.render(tmp_path)
    assert "## NVIDIA H200" in page
    assert "| a case | forward | locfast triton | 0.500 (0.400, 0.600) | 4000.0 GB/s | 93 | 12 |  |" in page
    assert "did not run: no reason" in page
    assert "older kernel*" not in page.split("## NVIDIA H200")[1]


def test_rows_of_changed_sources_are_marked_and_those_of_peers_are_not(measurement, tmp_path):
    measurement.sources["mask_embeddings"] = "0" * 16
    measurement.write(tmp_path)
    rows = [line for line in report.render(tmp_path).splitlines() if line.startswith("| a case")]
    assert ["older kernel" in row for row in rows] == [True, False]


def test_smoke_tests_are_passed_over(measurement, tmp_path):
    measurement.smoke = True
    measurement.write(tmp_path)
    assert report.render(tmp_path) == report.render(tmp_path / "empty")


def test_memory_measured_on_a_cpu_stands_below_and_claims_no_speed(measurement, tmp_path):
    measurement.machine = {"gpu": "cpu", "torch": "2.15.0"}
    measurement.ceilings = {}
    measurement.rows = [Row("a block", "both", "public form", peak_mib=808.3, note="627 MiB kept")]
    measurement.write(tmp_path)
    page = report.render(tmp_path)
    assert page.index("Not measured yet") < page.index("## On a CPU")
    assert "| a block | both | public form | 808 | 627 MiB kept |" in page


def test_targets_and_chart_stand_above_the_table(measurement, tmp_path):
    shape = {"B": 64, "H": 16, "T": 577, "D": 64}
    measurement.rows = [
        Row("L/14@336, bf16", "forward", who, ms, ms, ms, 300.0, "TFLOP/s", 40.0, 1.0, shape=shape)
        for who, ms in (("locfast triton", 1.0), ("flex exact", 2.0))
    ]
    path = measurement.write(tmp_path)
    path.with_suffix(".svg").write_text("<svg/>")
    page = report.render(tmp_path)
    target, row = (
        "| locfast triton | flex exact | 1.3x | 2.00x | met |",
        "| L/14@336, bf16 | forward | locfast triton |",
    )
    assert page.index(".svg)") < page.index(target) < page.rindex(row)


def test_hash_changes_with_any_source_of_the_op_and_with_nothing_else(tmp_path):
    for room, name in (("kernels", "triton.py"), ("csrc", "cuda.cu")):
        (tmp_path / room / "op").mkdir(parents=True)
        (tmp_path / room / "op" / name).write_text("first")
    before = sources_hash("op", tmp_path)
    (tmp_path / "kernels" / "other.py").write_text("not of this op")
    (tmp_path / "kernels" / "op" / "cache.pyc").write_text("not a source")
    assert sources_hash("op", tmp_path) == before
    (tmp_path / "csrc" / "op" / "cuda.cu").write_text("second")
    assert sources_hash("op", tmp_path) != before


def test_hash_of_one_file_does_not_change_with_its_neighbours(tmp_path):
    (tmp_path / "kernels" / "op").mkdir(parents=True)
    (tmp_path / "kernels" / "op" / "tiled.py").write_text("first")
    before = sources_hash("op/tiled.py", tmp_path)
    (tmp_path / "kernels" / "op" / "triton.py").write_text("another backend")
    assert sources_hash("op/tiled.py", tmp_path) == before != sources_hash("op", tmp_path)
    (tmp_path / "kernels" / "op" / "tiled.py").write_text("second")
    assert sources_hash("op/tiled.py", tmp_path) != before


def test_results_of_another_schema_are_refused(measurement, tmp_path):
    path = measurement.write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 0}))
    with pytest.raises(ValueError, match="schema 0, wanted 1"):
        Measurement.read(path)


def test_folder_names_are_plain():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def step(name: str, program: str) -> suite.Step:
    return suite.Step(name, ("-c", program), takes_options=False)


def outcomes(folder) -> dict[str, str]:
    lines = (folder / "suite.jsonl").read_text().splitlines()
    return {line["step"]: line["outcome"] for line in map(json.loads, lines)}


def test_suite_goes_on_after_a_failure_and_reports_it(tmp_path):
    failed = suite.run([step("bad", "raise SystemExit(3)"), step("good", "pass")], tmp_path, budget=60)
    assert failed == ["bad"]
    assert outcomes(tmp_path) == {"bad": "failed with exit code 3", "good": "passed"}


def test_a_step_gets_its_share_of_the_budget_and_leaves_the_rest(tmp_path):
    slow = suite.Step("tests", ("-c", "import time; time.sleep(30)"), takes_options=False, share=0.1)
    assert suite.run([slow, step("next", "pass")], tmp_path, budget=10) == []
    assert outcomes(tmp_path) == {"tests": "cut off by the budget", "next": "passed"}


def test_suite_measures_in_order_of_worth():
    ops = ["attn_softcap", "region_loss", "mask_embeddings", "select_views", "reconstruction_loss"]
    steps = ["step", "step_uta", "step_lut", "step_cloc", "region_share", "lut_forms"]
    assert [one.name for one in suite.STEPS] == ["parity", *ops, "teacher", *steps, "input", "optimizers", "product"]


def test_suite_stops_at_its_budget_and_lists_what_it_did_not_reach(tmp_path):
    steps = [step("slow", "import time; time.sleep(30)"), step("next", "pass")]
    assert suite.run(steps, tmp_path, budget=0.5) == []
    assert outcomes(tmp_path) == {"slow": "cut off by the budget", "next": "not reached"}


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    for told, found in {"0123abcd": ("0123abcd", False), "0123abcd-dirty": ("0123abcd", True)}.items():
        monkeypatch.setenv("LOCFAST_COMMIT", told)
        assert commit() == found
