from collections.abc import Iterator

import numpy as np
import pytest
import torch

from locfast.kernels import _backend
from locfast.kernels.softcap_attention import tiled

from .interpreter import mend_interpreter


@pytest.fixture(autouse=True)
def _strict_memory(poisoned_memory):
    """Every kernel test starts from poisoned memory."""


@pytest.fixture(autouse=True)
def _right_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    mend_interpreter(monkeypatch)
    # As on a GPU exp2 may reach infinity in a tanh, sums be empty, and rows that count nowhere hold what they like.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        yield


@pytest.fixture(params=["tiled", "triton"])
def backend(request, device) -> str:
    """Every backend with a backward of its own, but the compiled one, which has a file of tests of its own."""
    if request.param == "triton" and (reason := _backend.triton_probe(device, torch.float32)):
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=["one block", "several blocks"])
def blocks(request, monkeypatch):
    if request.param == "several blocks":
        monkeypatch.setattr(tiled, "MAX_BLOCK_SCORES", 1)  # then blocks have 16 rows, the least
