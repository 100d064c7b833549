"""The loader: positions in, batches out; decoded in worker processes, normalised on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from locfast.data.spec import ImageSpec, Source

Batch = dict[str, Any]


@dataclass
class Replaced:
    """What could not be read so far."""

    count: int = 0
    """Samples that stood in for an unreadable one."""
    names: dict[str, str] = field(default_factory=dict)
    """Every unreadable file, and why."""


class Loader:
    """Batches of a source for an ImageSpec; knows no model, no method, no rank.

    `workers` 0 decodes in this process, None chooses by the cores of this machine. `pin` None: pinned memory when the
    device is a GPU. `replaced` counts and names what could not be read, as far as batches were handed out.
    """

    replaced: Replaced

    def __init__(
        self,
        source: Source,
        spec: ImageSpec,
        *,
        seed: int,
        workers: int | None = None,
        device: torch.device | str = "cpu",
        decoder: str = "auto",
        pin: bool | None = None,
        prefetch: int = 4,
    ) -> None:
        raise NotImplementedError

    def batches(self, positions: Iterable[Tensor]) -> Iterator[Batch]:
        """One batch for each element of `positions`, a [B] int64 tensor of places in the stream of samples (`Order`).

        `positions` is read ahead of what is handed out. Closing the iterator ends the workers.

        A batch: {"views": {name: [B, 3, h, w] fp32, normalised, on the device}, "geometry": {name: Geometry on the
        CPU}, "position", "epoch", "index": [B] int64 on the device; the index is that of the sample shown, also where
        it is a replacement}, with "label_map": {name: [B, h, w] uint8 on the device} and "records": [Record] * B
        where the spec asks for them.
        """
        raise NotImplementedError

    def sequential(self, epoch: int, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """Like `batches`, for samples in a given order: `indices` yields [B] int64 dataset indices, and every sample
        draws in `epoch` (a constant that training never reaches). Positions are the indices as asked for."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What `replaced` holds, for a checkpoint (JSON)."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        """Count on from a checkpoint's `state()`; files named there are not named again."""
        raise NotImplementedError
