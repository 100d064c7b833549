import pytest

from .interpreter import mend_interpreter


@pytest.fixture(autouse=True)
def _strict_memory(poisoned_memory):
    """Every kernel test starts from poisoned memory."""


@pytest.fixture(autouse=True)
def _right_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    mend_interpreter(monkeypatch)
