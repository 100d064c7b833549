import json
import sys

import block_memory
import pytest


def test_one_form_is_measured_after_weights_and_inputs():
    pytest.importorskip("timm")  # the model is its
    figures = block_memory.measure("tiled", "cpu", batch=1, tokens=17)
    assert figures["peak"] >= figures["kept"]


def test_every_form_has_a_row_and_one_that_fails_says_why(tmp_path, monkeypatch, capsys):
    def measured(backend, args):
        if backend == "tiled":
            raise block_memory.subprocess.CalledProcessError(1, "python", stderr="a trace\nValueError: too small")
        return {"kept": 627.4, "peak": 807.9}

    monkeypatch.setattr(block_memory, "in_a_new_process", measured)
    monkeypatch.setattr(sys, "argv", ["block_memory.py", "--device", "cpu", "--out", str(tmp_path)])
    block_memory.main()
    result = json.loads((tmp_path / "cpu" / "block_memory.json").read_text())
    public, tiled = result["rows"]
    assert (public["who"], public["peak_mib"], public["ms"]) == ("public form", 807.9, None)
    assert public["note"] == "627 MiB kept between forward and backward"
    assert tiled["note"] == "did not run: ValueError: too small"
    assert result["command"] == "python benchmarks/block_memory.py --device cpu"
