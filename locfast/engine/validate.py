"""The loss on images that training never sees."""

from __future__ import annotations

from dataclasses import replace

import torch

from locfast.data.loader import Loader
from locfast.data.sources import hold_out, open_source
from locfast.data.spec import Source
from locfast.engine.distributed import World
from locfast.engine.precision import autocast
from locfast.methods.base import VALIDATION_EPOCH, Method

SHARE, MOST, FEWEST = 50, 1024, 20
"""Without --val one sample in SHARE is held out, at most MOST, and none of a source with fewer than FEWEST."""
FEW = 128
"""Up to this many images are decoded faster here than worker processes start."""


def split(source: Source, val: str | None, seed: int) -> tuple[Source, Source | None]:
    """The training source, and the held-out one or None: a source named by --val, none, or a small part of `source`."""
    if val == "none":
        return source, None
    if val is not None:
        return source, open_source(val, seed=seed)
    if len(source) < FEWEST:
        return source, None
    return hold_out(source, count=min(MOST, max(1, len(source) // SHARE)))


class Validation:
    """Means of a method's loss and its parts over a held-out source: the same draws every time, no random crops."""

    def __init__(
        self,
        source: Source,
        method: Method,
        world: World,
        *,
        micro_batch: int,
        seed: int,
        precision: str,
        **loading: object,
    ) -> None:
        self.world, self.seed, self.precision, self.samples = world, seed, precision, len(source)
        share = torch.arange(len(source)).tensor_split(world.size)[world.rank]
        self.indices = share.split(micro_batch) if len(share) else ()
        if len(share) <= FEW:
            loading["workers"] = 0
        spec = replace(method.validation_spec(), regions=False)  # few images: none of them may have a region
        self.loader = Loader(source, spec, seed=seed, device=method.device, **loading)  # type: ignore[arg-type]

    @torch.no_grad()
    def run(self, method: Method) -> dict[str, float]:
        """{"loss": mean over all held-out samples and ranks, other names likewise}."""
        was_training = method.training
        method.eval()
        sums: dict[str, torch.Tensor] = {}
        for batch in self.loader.sequential(VALIDATION_EPOCH, self.indices):
            keys = method.keys(self.seed, batch)
            with autocast(method.device, self.precision):
                parts = method(batch, method.draw(keys))
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.double() * len(keys)
        method.train(was_training)
        names = sorted(set().union(*self.world.gather(sorted(sums))))
        nothing = torch.zeros((), dtype=torch.float64, device=method.device)
        means = self.world.sum(torch.stack([sums.get(name, nothing) for name in names])) / self.samples
        return dict(zip(names, means.tolist(), strict=True))
