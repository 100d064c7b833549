"""On which device a run computes, in which precision, and how reproducibly."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch

from locfast.errors import UserError, suggest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By precision, what tensors are computed in."""
SAME_BITS = "AUTO,STRICT"
"""MKL promises a matrix product's bits from run to run only where this is set before its first one, whatever the number
of threads. Without it one resumed run among some hundred left its curve by a unit in the last place; with it products
have the bits that they had, and take as long."""


def pick_device(asked: str, local_rank: int = 0, ranks: int = 1) -> torch.device:
    """The device named by `--device`; `auto` and `cuda` mean the rank's own GPU. UserError where it does not exist."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        asked = "cuda" if found else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        near = suggest(asked, ("auto", "cpu", "cuda"))
        raise UserError(f"--device {asked}: locfast trains on cpu, cuda or cuda:NUMBER{near or '.'}")
    if device.type == "cpu":
        os.environ.setdefault("MKL_CBWR", SAME_BITS)
        torch.set_num_threads(
            torch.get_num_threads()
        )  # which also tells MKL not to choose their number at each product
        return device
    if not found:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise UserError(f"--device {asked}: no such device: {why}. Use --device cpu, or auto.")
    if ranks > 1 and device.index is not None:
        raise UserError(f"--device {asked} with {ranks} ranks: each rank takes a GPU of its own. Use --device cuda.")
    index = device.index if device.index is not None else local_rank
    if index >= found:
        names = ", ".join(f"cuda:{i}" for i in range(found))
        raise UserError(f"--device cuda:{index}: no such device; this machine has {names}.")
    return torch.device("cuda", index)


def pick_precision(asked: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that computes in it and fp32 elsewhere."""
    if asked != "auto":
        return asked
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """bf16 arithmetic around fp32 weights, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def make_deterministic() -> None:
    """Refuse every operation that may differ from run to run (`--deterministic`); call before the first GPU work."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
