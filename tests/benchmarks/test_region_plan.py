"""The plan for CLOC's batch on 64 GPUs: its page and JSON show what the code gives, and its figures what they must."""

import json
import sys

import _region_plan
import pytest
import region_loss
from _region_cost import Setting, peak
from _region_plan import FILE, PAGE, plan, tables, with_section
from _results import RESULTS, Measurement


@pytest.fixture(scope="module")
def found() -> dict:
    return plan()


def test_the_page_and_the_json_show_the_plan_as_the_code_works_it_out(found):
    page = PAGE.read_text()
    assert with_section(page, found) == page
    stored = json.loads((RESULTS / FILE).read_text())
    assert {name: stored[name] for name in found} == json.loads(json.dumps(found))


def test_it_is_for_the_paper_s_batch_on_64_gpus(found):
    settings = [row["setting"] for row in found["rows"]]
    assert all((at["ranks"], at["rows"]) == (64, 2048) for at in settings)
    assert [at["width"] for at in settings] == [512, 512, 768, 768, 1024, 1024]
    assert all(row["flops"] == 10 * 2048**2 * 64 * row["setting"]["width"] for row in found["rows"])
    assert all(row["kept"]["filter"] == 2048 * 131072 / 8 for row in found["rows"])


def test_times_come_from_measured_rates_and_from_the_link_that_is_given(found):
    rows = Measurement.read(RESULTS / _region_plan.MEASURED).rows
    rates = {row.rate for row in rows if row.direction == "both" and row.case.startswith("R 32768,")}
    assert set(found["measured"]["TFLOP/s by width"].values()) <= rates
    for row, other in zip(found["rows"], plan(link=100.0)["rows"], strict=True):
        assert row["ms on the link"] == pytest.approx(2 * other["ms on the link"])
        assert row["ms of products"] == other["ms of products"]
        assert row["ms on the link"] == pytest.approx(sum(row["sent"].values()) / 50e9 * 1e3)


def test_a_ring_needs_less_memory_and_stored_logits_far_more(found):
    for ring, gather in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        assert ring["peak"] < gather["peak"]
        stored = {way["name"]: way["stored"] for way in ring["plain ways"]}
        assert 40 * ring["peak"] < stored["own rows of the logits, both ways"] < stored["all pairs on every rank"] / 30


def test_memory_worked_out_for_a_gpu_alone_is_what_one_measured():
    """Vectors, and what the allocator rounds up, are 1 % from R 32768 on."""
    rows = [row for row in Measurement.read(RESULTS / _region_plan.MEASURED).rows if row.who == "locfast triton"]
    large = [row for row in rows if row.direction == "both" and row.shape["R"] >= 32768]
    assert len(large) >= 8
    for row in large:
        at = Setting(1, row.shape["R"], row.shape["E"], filters="no filter" not in row.case)
        assert peak(at) / 2**20 == pytest.approx(row.peak_mib, rel=0.01), row.case


def test_a_case_that_nobody_measured_has_no_time(tmp_path):
    measured = Measurement.read(RESULTS / _region_plan.MEASURED)
    measured.rows = [row for row in measured.rows if row.shape.get("E") != 1024]
    measured.write(tmp_path)
    with pytest.raises(ValueError, match="no row for R 32768, E 1024"):
        plan(results=tmp_path)


def test_another_link_is_printed_and_changes_no_file(monkeypatch, capsys):
    page, stored = PAGE.read_text(), (RESULTS / FILE).read_text()
    monkeypatch.setattr(sys, "argv", ["region_loss.py", "--device", "cpu", "--plan", "--link-gb-s", "25"])
    region_loss.main()
    assert "a link of 25 GB/s" in capsys.readouterr().out
    assert (PAGE.read_text(), (RESULTS / FILE).read_text()) == (page, stored)


def test_every_row_of_the_plan_is_in_its_tables(found):
    lines = tables(found)
    assert sum(line.startswith("| ViT-") for line in lines) == 2 * len(found["rows"])
