import json
import subprocess
import sys
from pathlib import Path

import torch

import locfast
from locfast import env
from locfast.kernels import _backend

ROOT = Path(locfast.__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_report_names_versions_build_and_the_backend_of_every_op(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["env"])
    env.main()
    report = capsys.readouterr().out
    assert f"torch          {torch.__version__.split('+')[0]}" in report
    for op in _backend.OPS:
        assert op in report
    assert "compiled ops" in report


def test_help_imports_no_torch():
    program = "import sys, runpy; sys.argv = ['env', '--help']\n"
    program += "try:\n    runpy.run_module('locfast.env', run_name='__main__')\n"
    program += "except SystemExit:\n    sys.exit('torch' in sys.modules)"
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout


def test_report_works_without_triton():
    program = "import sys, runpy; sys.modules['triton'] = None; runpy.run_module('locfast.env', run_name='__main__')"
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    assert "mask_embeddings" in result.stdout


def test_build_tells_what_the_wheel_recorded(tmp_path, monkeypatch):
    record = {"native": False, "reason": "no CUDA compiler (nvcc) found"}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    found = {"_build.json": tmp_path / "_build.json"}
    monkeypatch.setattr(_backend, "package_file", found.get)
    monkeypatch.setattr(_backend, "library_failure", lambda: "locfast/_C.so was not built")
    assert env._build() == {
        "compiled ops": "none: no CUDA compiler (nvcc) found",
        "loads": "no: locfast/_C.so was not built",
    }
    record = {"native": True, "cuda": "13.0", "torch": "2.15", "architectures": "80-real;90a-real", "commit": ""}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    build = env._build()
    assert build["compiled ops"] == "CUDA 13.0, against torch 2.15"
    assert build["architectures"] == "80-real 90a-real"
    assert build["commit"] == "unknown"


def test_report_works_where_nothing_was_installed(monkeypatch):
    monkeypatch.setattr(_backend, "package_file", lambda name: None)
    monkeypatch.setattr(_backend, "library_failure", lambda: "locfast/_C.so was not built")
    assert env.environment()["build"]["compiled ops"].startswith("none")
