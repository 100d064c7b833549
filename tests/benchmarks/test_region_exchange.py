"""The benchmark of how texts travel between ranks runs, with real ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    asked = [sys.executable, "benchmarks/region_exchange.py", *options]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_both_ways_are_timed_on_two_ranks(tmp_path):
    done = run("--device", "cpu", "--smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cpu" / "region_exchange.json").read_text())
    assert [row["who"] for row in found["rows"]] == ["locfast ring", "locfast gather"]
    assert all(0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in found["rows"])
    assert found["smoke"]


def test_one_gpu_has_nobody_to_send_texts_to():
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() > 1:
        pytest.skip("there are several")
    done = run("--device", "cuda")
    assert done.returncode == 2
    assert "use --device cpu" in done.stderr or "use cpu" in done.stderr
