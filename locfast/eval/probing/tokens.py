"""The backbone's tokens of all images of a split: held in memory, on a disk, or computed anew each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.eval.probing.images import Images

Featurizer = Callable[[Tensor], Tensor]
"""Normalised images [B, 3, H, W] -> tokens [B, T, C]."""

KEPT = torch.float16


class Tokens(Protocol):
    def batches(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each [B] int64 of `rows`: (rows, tokens [B, T, C] fp32 on the device)."""
        ...


class Held:
    """Tokens in fp16: a tensor [M, T, C] on the device, or a file of it that is mapped into memory."""

    def __init__(self, values: Tensor | np.ndarray, device: torch.device) -> None:
        self.values, self.device = values, device

    def batches(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for some in rows:
            if isinstance(self.values, Tensor):
                yield some, self.values[some.to(self.values.device)].float()
            else:
                yield some, torch.from_numpy(self.values[some.cpu().numpy()]).to(self.device).float()


class Live:
    """Tokens that are computed from the images whenever they are asked for."""

    def __init__(self, images: Images, featurize: Featurizer) -> None:
        self.images, self.featurize = images, featurize

    def batches(self, rows: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.images.batches(rows):
            with torch.inference_mode():
                tokens = self.featurize(batch.pixels)
            yield batch.rows, tokens.float().clone()  # a tensor of inference mode takes part in no backward pass


def kept(tokens: Tensor) -> Tensor:
    """Tokens as they are held. Raises UserError for those beyond the range of fp16."""
    held = tokens.to(KEPT)
    if not bool(held.isfinite().all()):
        raise UserError(
            "the backbone's features are not finite in fp16, in which they are kept: probe with --features live."
        )
    return held


def room(device: torch.device) -> int:
    """Bytes on the device that tokens may take: half of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    available = next(
        (int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line), 0
    )
    return available * 1024 // 2
