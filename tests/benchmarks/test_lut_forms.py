"""What the forms of LUT are said to cost is what their shapes cost, and what was measured."""

import json
import sys

import lut_forms
import pytest
from _results import RESULTS, Measurement

pytest.importorskip("timm")


def block(tokens, width):
    """Multiply-adds of a transformer block over one sequence."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def test_flops_are_those_of_the_shapes():
    """On ViT-Ti/16 at 64 px: 16 patches, 4 visible, decoder 8 x 512, heads of 4096."""
    rows = lut_forms.measure("vit_tiny_patch16_224", 64, 2, "cpu", 2)
    found = {row.who.removeprefix("locfast "): row.shape["MFLOP"] * 1e6 / 2 for row in rows}
    masked, whole = 12 * block(5, 192), 12 * block(17, 192)
    patch = 768 * 192
    decoder = 5 * 192 * 512 + 8 * block(17, 512) + 16 * 512 * 768
    head = 2 * 192 * 4096
    # a backward is twice its forward, but no gradient goes to pixels; the last output is made of patches alone
    alone = 2 * (3 * (masked + decoder) + 2 * 4 * patch)
    extra = 2 * (whole + 16 * patch + head + 3 * 2 * head)
    student = 2 * (3 * masked + 2 * 4 * patch)
    assert found["MAE alone"] == pytest.approx(alone, rel=1e-3)
    assert found["paper"] == pytest.approx(alone + extra, rel=1e-3)
    assert found["reference"] == pytest.approx(alone + student + 2 * extra, rel=1e-3)


def test_a_smoke_test_writes_a_row_for_every_form(tmp_path, monkeypatch):
    arguments = [
        "lut_forms.py",
        "--smoke",
        "--device",
        "cpu",
        "--model",
        "vit_tiny_patch16_224",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    lut_forms.main()
    result = json.loads((tmp_path / "cpu" / "lut_forms.json").read_text())
    assert [row["who"] for row in result["rows"]] == ["locfast MAE alone", "locfast paper", "locfast reference"]
    assert all(row["ms"] > 0 and row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in result["rows"])
    assert result["smoke"]


def test_the_page_shows_what_was_measured():
    page = lut_forms.PAGE.read_text()
    assert lut_forms.with_tables(page, RESULTS) == page
    measured = Measurement.read(RESULTS / "cpu" / "lut_forms.json")
    assert "\n".join(lut_forms.table(measured)) in page
