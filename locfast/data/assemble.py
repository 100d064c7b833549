"""From the parts that workers made to a batch on the device."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locfast.data.decode.device import constants, normalise
from locfast.data.reader import Done
from locfast.data.spec import Geometry, ImageSpec

Batch = dict[str, Any]


class Assembler:
    """Puts the parts of a batch together on a device. `pin`: the small tensors that are made here, in pinned memory."""

    def __init__(self, spec: ImageSpec, device: torch.device, pin: bool) -> None:
        self.spec, self.device, self.pin = spec, device, pin
        self.constants = constants(spec, device)

    def __call__(self, parts: list[Done], decoded: dict[str, Tensor] | None = None) -> Batch:
        """The batch of `parts`; `decoded`: the views that a device decoder made of what they handed on, in order."""
        batch: Batch = {
            "views": {name: self._view(name, parts, decoded) for name in self.spec.views},
            "geometry": {name: _geometry([part.geometry[name] for part in parts]) for name in self.spec.views},
        }
        names = ("position", "epoch", "index")
        numbers = {n: torch.tensor([v for part in parts for v in getattr(part, n)], dtype=torch.int64) for n in names}
        if self.pin:
            numbers = {name: number.pin_memory() for name, number in numbers.items()}
        batch["host"] = numbers
        batch |= {name: number.to(self.device, non_blocking=True) for name, number in numbers.items()}
        if self.spec.label_map:
            maps = {name: [part.label_map[name] for part in parts] for name in self.spec.views}
            batch["label_map"] = {name: self._moved(map_parts) for name, map_parts in maps.items()}
        if self.spec.records:
            batch["records"] = [record for part in parts for record in part.records]
        return batch

    def _view(self, name: str, parts: list[Done], decoded: dict[str, Tensor] | None) -> Tensor:
        pixels = [part.views[name] for part in parts if name in part.views]
        if decoded is None:
            return self._normalised(name, pixels)
        if not pixels:
            return decoded[name]
        there: list[int] = []
        here: list[int] = []
        start = 0
        for part in parts:
            rows = set(part.handed_on.rows if part.handed_on else ())
            for i in range(len(part.index)):
                (there if i in rows else here).append(start + i)
            start += len(part.index)
        view = decoded[name].new_empty((start, *decoded[name].shape[1:]))
        view[self._integers(there)] = decoded[name]
        view[self._integers(here)] = self._normalised(name, pixels)
        return view

    def _normalised(self, name: str, pixels: list[Tensor]) -> Tensor:
        if self.device.type != "cpu":
            return normalise(self._moved(pixels).permute(0, 3, 1, 2).contiguous().float(), *self.constants[name])
        white, mean, std = (constant.numpy() for constant in self.constants[name])
        view = torch.empty((sum(map(len, pixels)), 3, *self.spec.views[name].size))
        # image by image, so that each pass finds in the cache what the one before it wrote; by numpy, whose one thread
        # does not wait for a second one where workers have the cores
        for image, target in zip(chain.from_iterable(part.numpy() for part in pixels), view.numpy(), strict=True):
            np.divide(image.transpose(2, 0, 1), white, out=target)
            np.subtract(target, mean, out=target)
            np.divide(target, std, out=target)
        return view

    def _moved(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.to(self.device, non_blocking=True) for part in parts])

    def _integers(self, values: list[int]) -> Tensor:
        tensor = torch.tensor(values, dtype=torch.int64)
        return (tensor.pin_memory() if self.pin else tensor).to(self.device, non_blocking=True)


def on_gpu(batch: Batch) -> list[Tensor]:
    """The tensors of a batch that lie on a GPU."""
    inside = [value for part in batch.values() for value in (part.values() if isinstance(part, dict) else [part])]
    return [value for value in inside if isinstance(value, Tensor) and value.is_cuda]


def _geometry(parts: list[dict[str, Any]]) -> Geometry:
    rows = {name: [part[name] for part in parts] for name in ("box", "inside", "flip", "source_size")}
    joined = {name: torch.cat([torch.from_numpy(row) for row in parts]) for name, parts in rows.items()}
    return Geometry(**joined, size=parts[0]["size"])
