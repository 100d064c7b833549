"""Which implementation an op takes: `auto | reference | tiled | triton | cuda`, by argument, flag or LOCFAST_KERNELS.

An op registers a probe for each backend it has: a function of (device, dtype) that returns None where the backend can
run, or the reason why it cannot. `auto` takes the first that can and says once why it passed over the faster ones; a
backend asked for by name that cannot run raises BackendError.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

PLAIN = ("tiled", "reference")
"""Backends of plain PyTorch, which run on every device."""
BACKENDS = ("auto", *PLAIN, "triton", "cuda")
OPS = (
    "mask_embeddings",
    "quantize_rows",
    "reconstruction_loss",
    "region_contrastive_loss",
    "select_views",
    "softcap_attention",
)
"""Every op that has more than its reference: one folder each beside this file."""

FP8_SINCE = (8, 9)
"""The compute capability from which GPUs convert to e4m3 and multiply in it."""

Probe = Callable[[torch.device, torch.dtype], str | None]
"""Why a backend cannot run on a device with a dtype; None where it can."""

log = logging.getLogger("locfast.kernels")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


@dataclass(frozen=True)
class Choice:
    """The backend an op takes, and why the faster ones were passed over (empty if none was)."""

    backend: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})" if self.reason else self.backend


_registry: dict[str, dict[str, Probe]] = {}
_chosen: str | None = None
_said: set[tuple[str, str]] = set()


def register(op: str, probes: dict[str, Probe]) -> None:
    """Make an op known: its backends with their probes, in the order in which `auto` tries them."""
    _registry[op] = probes


def set_backend(name: str | None) -> None:
    """Choose the backend of every op for this process; None returns the choice to LOCFAST_KERNELS."""
    global _chosen
    _chosen = None if name is None else _known(name, "set_backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every op inside a `with` block."""
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


@torch.compiler.assume_constant_result  # probing touches files and logs: nothing for a graph
def choose(op: str, device: torch.device, dtype: torch.dtype, asked: str = "auto", plain_because: str = "") -> str:
    """The backend that `op` takes for tensors of this device and dtype. Raises BackendError, or says once why.

    plain_because: why only plain PyTorch will do for this call, whatever the device ("it takes no bias").
    """
    choice = _choice(op, device, dtype, asked, plain_because)
    if choice.reason and (op, str(choice)) not in _said:
        _said.add((op, str(choice)))
        # On a GPU a slower backend than could be is news; on a CPU it is what everybody expects.
        log.log(logging.WARNING if device.type == "cuda" else logging.INFO, "%s: %s", op, choice)
    return choice.backend


def check(op: str, device: torch.device, dtype: torch.dtype, plain_because: str = "") -> None:
    """Raise BackendError where `choose` would, and say nothing: for before a run."""
    _choice(op, device, dtype, "auto", plain_because)


def describe(device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """What each op would take on `device`: {"mask_embeddings": "reference (triton: ...)", ...}. Never raises."""
    for op in OPS:
        importlib.import_module(f"{__package__}.{op}")
    result = {}
    for op in _registry:
        try:
            result[op] = str(_choice(op, torch.device(device), dtype, "auto"))
        except BackendError as error:
            result[op] = f"none: {error}"
    return result


def _choice(op: str, device: torch.device, dtype: torch.dtype, asked: str, plain_because: str = "") -> Choice:
    probes = _registry[op]
    if plain_because:
        probes = {name: probe if name in PLAIN else lambda *_: plain_because for name, probe in probes.items()}
    source = f"backend={asked!r}"
    if asked == "auto":
        if _chosen is not None:
            asked, source = _chosen, f"--kernels {_chosen}"
        elif variable := os.environ.get("LOCFAST_KERNELS"):
            asked, source = variable, f"LOCFAST_KERNELS={variable}"
    _known(asked, source)
    if asked == "tiled" and asked not in probes:
        asked = "reference"  # an op without a tiled form stores nothing quadratic in its reference either
    if asked != "auto":
        reason = probes[asked](device, dtype) if asked in probes else f"{op} has no {asked} kernel"
        if reason is None:
            return Choice(asked)
        can = [name for name, probe in probes.items() if probe(device, dtype) is None]
        raise BackendError(
            f"{op}: {source} was asked for, with {str(dtype).removeprefix('torch.')} tensors on {device}, "
            f"but {reason}. Use {' or '.join(can)}, or auto to take the fastest that can run."
        )
    passed_over = []
    if device.type == "cpu":  # fused kernels run on a CPU for tests alone: by name
        probes = {name: probe for name, probe in probes.items() if name in PLAIN}
        passed_over.append("no CUDA device")
    for name, probe in probes.items():
        reason = probe(device, dtype)
        if reason is None:
            return Choice(name, "; ".join(passed_over))
        passed_over.append(f"{name}: {reason}")
    raise BackendError(f"{op}: no backend can run on {device}: {'; '.join(passed_over)}")


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source}: no such backend. Use one of {', '.join(BACKENDS)}.")
    return name


def anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    """Probe of plain PyTorch."""
    return None


def absent(device: torch.device, dtype: torch.dtype) -> str | None:
    """Probe of a kernel that an op is still to get."""
    return "it has no such kernel yet"


def triton_probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """Probe of Triton kernels in fp32, bf16 and fp16: on a GPU from sm_80 on, or on the CPU with TRITON_INTERPRET=1."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"needs a CUDA device, tensors are on {device.type}"
    if device.type == "cuda" and capability(device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return _triton_failure()


def triton_fp8_probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """Probe of Triton kernels that write e4m3, which GPUs have from sm_89 on."""
    if device.type == "cuda" and capability(device) < FP8_SINCE:
        return "needs compute capability 8.9 or newer"
    return triton_probe(device, dtype)


def cuda_probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """Probe of the ops in locfast/_C.so, which run on CUDA devices and, by the same arithmetic, on the CPU."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no {str(dtype).removeprefix('torch.')}"
    if device.type not in ("cuda", "cpu"):
        return f"needs a CUDA device or the CPU, tensors are on {device.type}"
    return library_failure()


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; where there is none a new one, so that what is told of it does not depend on this machine."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


@functools.cache
def _triton_failure() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken Triton raises more than ImportError: missing drivers, headers, ABI
        return f"import triton failed: {type(error).__name__}: {error}"
    return None


def package_file(name: str) -> Path | None:
    """A file that the build puts into the package; an editable install keeps it apart from the sources."""
    folders = [Path(folder) for folder in sys.modules[__name__.partition(".")[0]].__path__]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


@functools.cache
def library_failure() -> str | None:
    """Load locfast/_C.so; None when its ops are there, or why they are not. The answer is kept, good or bad."""
    path = package_file("_C.so")
    if path is None:
        return "locfast/_C.so was not built (locfast was not installed, or without a CUDA compiler)"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # the loader raises OSError, registration RuntimeError; both mean: not usable
        return f"locfast/_C.so does not load in torch {torch.__version__}: {error}"
    return None
