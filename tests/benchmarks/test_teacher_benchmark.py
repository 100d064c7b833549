import json
import sys

import pytest
import torch

pytest.importorskip("timm")  # the models are its

import teacher
from _teacher_error import error


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["teacher.py", "--device", "cpu", "--smoke", *map(str, arguments)])
    teacher.main()


def test_every_form_of_the_teacher_and_every_product_has_a_row(monkeypatch, tmp_path):
    run(monkeypatch, "--out", tmp_path)
    rows = json.loads((tmp_path / "cpu" / "teacher.json").read_text())["rows"]
    names = ("bf16", "bf16 compiled", "fp8", "fp8 compiled", "fp8, exact sums")
    timed = {row["who"] for row in rows if row["case"].startswith("smoke, B 2, V 3") and row["ms"] is not None}
    assert timed == {f"locfast {name}" for name in names}
    for row in rows:
        assert row["ms"] is not None or row["who"].startswith("torchao"), row
    products = {row["case"].split()[1] for row in rows if "] x [" in row["case"]}
    assert products == {"qkv", "proj", "fc1", "fc2"}
    told = json.loads((tmp_path / "cpu" / "teacher_error" / "smoke.json").read_text())["errors"]
    assert len(told["fp8"]["blocks"]) == 2
    assert told["fp8"]["targets"]["relative"] > told["bf16"]["targets"]["relative"] > 0


def test_a_teacher_with_a_wrong_product_is_refused(monkeypatch, tmp_path):
    right = teacher.fp8.fp8_linear
    monkeypatch.setattr(teacher.fp8, "fp8_linear", lambda *operands: 1.5 * right(*operands))
    run(monkeypatch, "--out", tmp_path, "--products", "none")
    rows = json.loads((tmp_path / "cpu" / "teacher.json").read_text())["rows"]
    for row in rows:
        wrong = row["who"].startswith("locfast fp8")
        assert wrong == row["note"].startswith("refused, result is wrong: targets are"), row


def test_errors_are_those_of_the_formula():
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = error(torch.tensor([[3.0, 4.0], [2.0, 0.0]]), exact)
    assert found == pytest.approx({"cosine": 0.5, "least_cosine": 0.0, "relative": (8 / 29) ** 0.5})


def test_the_demos_teacher_is_measured_on_its_scenes(monkeypatch, tmp_path):
    run(monkeypatch, "--out", tmp_path, "--demo")
    told = json.loads((tmp_path / "cpu-demo" / "teacher_error" / "demo.json").read_text())["errors"]
    assert set(told) == {"bf16", "fp8", "fp8 in fp32"} and len(told["fp8"]["blocks"]) == 11
    # 2.6 % an operand and 3.7 % a product, beside residuals that are exact
    assert 0.005 < told["fp8"]["targets"]["relative"] < 0.037
    assert told["bf16"]["targets"]["relative"] < 0.005
