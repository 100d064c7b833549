"""What every peer needs: its library, or the reason why it is not there, and torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


class NotInstalledError(Exception):
    """The library is not there (as opposed to: it is there and does not load)."""


def library(name: str) -> ModuleType:
    """Import a peer's library. Raises NotInstalledError, or whatever the library raises when it does not load."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name + ".").startswith(error.name + "."):
            raise NotInstalledError(f"{name} is not installed") from None
        raise  # it is there, and what it needs is not


def torch_compile(
    function: Callable[..., Any], mode: str | None = None, backward_alone: bool = True
) -> Callable[..., Any]:
    """On a GPU by Inductor. On a CPU, where only smoke tests run, C++ would take a minute: there by tracing alone.

    backward_alone: it must run again and again from one forward, so that it may not overwrite what that one stored.
    """
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = not backward_alone
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(function, dynamic=False, mode=mode, backend=backend)
