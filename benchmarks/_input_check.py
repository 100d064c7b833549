"""Are a decoder's pixels right? All are held to those of locfast's CPU decoder, on equal boxes of equal images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _harness import first_line
from torch import Tensor

from locfast.data.loader import Loader
from locfast.data.spec import ImageSpec, Source, View

CHECKED = 48
"""Images that are compared."""
MAX_DIFFERENCE = 2.0
"""Levels of 255 by which pixels may differ on average. On the 107 photographs of tests, chroma that is enlarged without
a filter, as some decoders do, gives 1.5; no antialiasing gives 2.05, and a crop that is one pixel off gives 11."""


class Pixels:
    """What the CPU decoder makes of the first images of a run: what all others must find."""

    def __init__(self, source: Source, size: int) -> None:
        view = View((size, size), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "random_resized")  # no flip: a box says it all
        self.source, self.spec, self.count = source, ImageSpec({"image": view}), min(CHECKED, len(source))
        batch = self._batch("cpu", torch.device("cpu"))
        self.index, self.boxes = batch["index"].tolist(), batch["geometry"]["image"].box.long().tolist()
        self.wanted = batch["views"]["image"]

    def of_decoder(self, name: str, device: torch.device) -> str:
        """How far locfast's decoder `name` is off. AssertionError where that is too far, and what the loader raises."""
        return self._compare(self._batch(name, device)["views"]["image"].cpu())

    def of_peer(self, pixels: Callable[[bytes, tuple[int, int, int, int]], Tensor]) -> str:
        """The same for a recipe that decodes and resizes one box of one image at a time."""
        images = [self.source.read(i).image for i in self.index]
        return self._compare(
            torch.stack([pixels(data, tuple(box)) for data, box in zip(images, self.boxes, strict=True)])
        )

    def _batch(self, decoder: str, device: torch.device) -> dict:
        loader = Loader(self.source, self.spec, seed=0, workers=0, device=device, decoder=decoder)
        return next(loader.batches([torch.arange(self.count)]))

    def _compare(self, found: Tensor) -> str:
        difference = 255 * (found - self.wanted).abs().mean(dim=(1, 2, 3))
        mean, worst = difference.mean().item(), difference.max().item()
        assert mean <= MAX_DIFFERENCE, f"pixels differ by {mean:.2f} of 255 levels, allowed are {MAX_DIFFERENCE}"
        return f"{mean:.2f} of 255 levels off, {worst:.2f} in the worst image"


def outcome(check: Callable[[], str]) -> dict[str, str]:
    """{"note": what a check says} or {"failed": why there is nothing to time}."""
    try:
        return {"note": check()}
    except AssertionError as error:
        return {"failed": f"refused, result is wrong: {first_line(error)}"}
    except Exception as error:  # a library that does not load, a driver too old, ...: the table tells
        return {"failed": f"did not run: {first_line(error)}"}
