"""What the compiler makes of the Triton kernels for an H100, read on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_for_sm_90.py")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict:
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_no_kernel_spills_registers(kernels):
    for name, kernel in kernels.items():
        resources = kernel["resources"]
        assert resources["REG"] > 0, name
        assert resources["STACK"] == resources["LOCAL"] == 0, f"{name}: {resources}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_mask_embeddings_moves_16_bytes_at_a_time(kernels, dtype):
    for name, access in ((f"mask_embeddings {dtype}", "st"), (f"mask_embeddings_backward {dtype}", "ld")):
        assert f"{access}.global.v4.b32" in kernels[name]["ptx"], name
