"""Which decoder a run takes, and why."""

from __future__ import annotations

from collections.abc import Callable

import torch

from locfast.data.decode.check import difference
from locfast.data.decode.dali import DaliDecoder
from locfast.data.decode.device import BatchFailed, DeviceDecoder, Unavailable
from locfast.data.decode.nvjpeg import NvjpegDecoder
from locfast.data.spec import ImageSpec
from locfast.errors import UserError, suggest

MAKERS: dict[str, Callable[[ImageSpec, torch.device], DeviceDecoder]] = {"dali": DaliDecoder, "nvjpeg": NvjpegDecoder}
NAMES = ("auto", "cpu", *MAKERS)
AUTO = ("dali",)
"""What auto tries before the CPU. Not nvjpeg: beside an H200 it made 700 to 900 images a second and 15 workers 4,100 to
7,000 (benchmarks/results/nvidia-h200/input.json)."""


def choose(name: str, spec: ImageSpec, device: torch.device) -> tuple[DeviceDecoder | None, str]:
    """The decoder called `name` (`--decoder`), None for the CPU decoder in the workers; and what it is and why.

    auto: on a GPU DALI, where it is there and gives the CPU decoder's pixels of a few test images; else the CPU
    decoder. Raises UserError for one asked for by name that cannot run or decodes no test image; one that decodes them
    otherwise than the CPU is taken, and the line says so.
    """
    if name not in NAMES:
        raise UserError(f"asked for --decoder {name}, found {', '.join(NAMES)}{suggest(name, NAMES)}")
    if name == "cpu":
        return None, "cpu, as asked for"
    if name in MAKERS:
        try:
            off = difference(MAKERS[name](spec, device), spec)
        except Exception as error:  # a driver too old, a GPU that is full, ...: before the run writes anything
            raise UserError(f"asked for --decoder {name}, which cannot run here: {_told(error)}") from None
        return MAKERS[name](spec, device), f"{name}, as asked for" + (f", although {off}" if off else "")
    if device.type != "cuda":
        return None, "cpu (there is no GPU to decode on)"
    passed_over: list[str] = []
    for candidate in AUTO:
        wrong = _fault(MAKERS[candidate], spec, device)
        if wrong is None:
            return MAKERS[candidate](spec, device), "; ".join(
                [f"{candidate} (its test images agree with the CPU's)", *passed_over]
            )
        passed_over.append(f"not {candidate}: {wrong}")
    return None, "; ".join(["cpu", *passed_over])


def _fault(
    make: Callable[[ImageSpec, torch.device], DeviceDecoder], spec: ImageSpec, device: torch.device
) -> str | None:
    """Why a decoder is not to be taken, or None."""
    try:
        return difference(make(spec, device), spec)
    except Exception as error:  # a decoder that nobody asked for must not end a run
        return _told(error)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, (Unavailable, BatchFailed)) else f"{type(error).__name__}: {error}"
