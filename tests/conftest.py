"""What every test may rely on: threads within bounds, Triton on the CPU where there is no GPU, shared material."""

import os

# Read by Triton when it is first imported, so before anything imports it. With a GPU its kernels run there instead.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a run on the CPU sets too: MKL reads it at its first product, which may be of a test before any run.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # Tests run small matrices: more than two threads only add overhead, and none on a machine that asks for fewer.
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device: run `make test` on a machine that has one")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN, in C++ as in Python, so that an element nobody writes is noticed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def shared() -> Path:
    """Material beside the checkout (photographs, label maps); tests that need it skip where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no shared material at {path.name}/ beside the checkout")
    return path
