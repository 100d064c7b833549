import logging
import os
import subprocess
import sys

import pytest
import torch

from locfast.kernels import _backend
from locfast.kernels._backend import BackendError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def refuse(device: torch.device, dtype: torch.dtype) -> str:
    return "it was switched off"


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op with a Triton kernel that cannot run, and two in plain PyTorch that can."""
    monkeypatch.setattr(_backend, "_registry", {})
    monkeypatch.setattr(_backend, "_said", set())
    monkeypatch.delenv("LOCFAST_KERNELS", raising=False)
    probes = {"triton": refuse, "tiled": _backend.anywhere, "reference": _backend.anywhere}
    _backend.register("some_op", probes)
    return "some_op"


def test_auto_takes_the_first_that_can_run(op):
    assert _backend.choose(op, GPU, torch.float32) == "tiled"


def test_auto_says_why_once_and_loudly_on_a_gpu(op, caplog):
    with caplog.at_level(logging.INFO, "locfast.kernels"):
        for _ in range(3):
            _backend.choose(op, GPU, torch.float32)
            _backend.choose(op, CPU, torch.float32)
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert "some_op: tiled (triton: it was switched off)" in caplog.text
    assert "some_op: tiled (no CUDA device)" in caplog.text


def test_a_named_backend_that_cannot_run_raises_with_the_four_parts(op):
    with pytest.raises(BackendError) as error:
        _backend.choose(op, GPU, torch.bfloat16, "triton")
    message = str(error.value)
    assert "backend='triton' was asked for" in message
    assert "bfloat16 tensors on cuda" in message
    assert "it was switched off" in message
    assert "Use tiled or reference, or auto" in message


def test_a_backend_that_the_op_does_not_have_raises(op):
    with pytest.raises(BackendError, match="no cuda kernel"):
        _backend.choose(op, GPU, torch.float32, "cuda")


def test_argument_goes_before_set_backend_before_environment(op, monkeypatch):
    monkeypatch.setenv("LOCFAST_KERNELS", "triton")
    with pytest.raises(BackendError, match="LOCFAST_KERNELS=triton"):
        _backend.choose(op, CPU, torch.float32)
    with _backend.use_backend("reference"):
        assert _backend.choose(op, CPU, torch.float32) == "reference"
        assert _backend.choose(op, CPU, torch.float32, "tiled") == "tiled"
    with pytest.raises(BackendError, match="LOCFAST_KERNELS=triton"):
        _backend.choose(op, CPU, torch.float32)


def test_tiled_is_the_reference_of_an_op_with_nothing_to_tile(op):
    _backend.register("flat_op", {"reference": _backend.anywhere})
    assert _backend.choose("flat_op", CPU, torch.float32, "tiled") == "reference"


def test_unknown_names_are_refused_where_they_are_given(op, monkeypatch):
    with pytest.raises(BackendError, match="backend='tritn'.*auto, tiled, reference, triton, cuda"):
        _backend.choose(op, CPU, torch.float32, "tritn")
    with pytest.raises(BackendError, match="set_backend.*Use one of"):
        _backend.set_backend("fast")
    monkeypatch.setenv("LOCFAST_KERNELS", "fast")
    with pytest.raises(BackendError, match="LOCFAST_KERNELS=fast"):
        _backend.choose(op, CPU, torch.float32)


def test_fused_kernels_refuse_dtypes_they_do_not_have():
    assert "float64" in str(_backend.triton_probe(GPU, torch.float64))
    assert "float64" in str(_backend.cuda_probe(CPU, torch.float64))


def test_triton_leaves_gpus_before_ampere_to_plain_pytorch(monkeypatch):
    monkeypatch.setattr(_backend, "capability", lambda device: (7, 5))
    assert _backend.triton_probe(GPU, torch.float16) == "needs compute capability 8.0 or newer"


def test_describe_names_every_op():
    described = _backend.describe("cpu")
    assert described["mask_embeddings"] == "reference (no CUDA device)"
    assert described["softcap_attention"] == "tiled (no CUDA device)"
    assert set(described) == set(_backend.OPS)


def test_every_op_folder_is_listed():
    folder = os.path.dirname(os.path.abspath(_backend.__file__))
    ops = {f for f in os.listdir(folder) if os.path.isfile(os.path.join(folder, f, "__init__.py"))}
    assert ops - {"philox"} == set(_backend.OPS)  # philox is chosen by no one: its kernel lives inside others


def test_a_broken_library_is_a_reason_and_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(_backend, "package_file", lambda name: tmp_path / name)
    reason = _backend.library_failure.__wrapped__()
    assert "does not load in torch" in reason
    assert torch.__version__ in reason


def test_ops_work_without_triton_and_without_the_library():
    """In a process where `import triton` fails and there is no _C.so."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from locfast.kernels import _backend
_backend.package_file = lambda name: None
from locfast.kernels.mask_embeddings import mask_embeddings
x, visible, position = torch.ones(1, 2, 4), torch.tensor([[[True, False]]]), torch.zeros(3, 4)
assert mask_embeddings(x, visible, position).sum() == 4
for backend, reason in (("cuda", "was not built"), ("triton", "CUDA device|import triton failed")):
    try:
        mask_embeddings(x, visible, position, backend=backend)
    except _backend.BackendError as error:
        assert any(part in str(error) for part in reason.split("|")), error
    else:
        raise AssertionError(backend)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
