"""One pass over some images with several backbones: attention distance, spectrum and maps, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from locfast.data.loader import Loader
from locfast.data.spec import ImageSpec, Source, View
from locfast.errors import UserError
from locfast.eval.analysis.distance import Reach, pairwise_distances, reach
from locfast.eval.analysis.spectrum import Covariance, Spectrum, spectrum
from locfast.eval.global_ability.features import EVERY, FEW, Reading, evaluation_view
from locfast.models.attention_maps import check_maps, layer_by_layer
from locfast.models.backbone import Backbone
from locfast.random import permute

log = logging.getLogger("locfast")

Point = tuple[float, float]
"""Row and column in an image of height and width 1."""


@dataclass(frozen=True)
class Model:
    """A backbone, its soft cap, and which of its patches are queries of maps."""

    backbone: Backbone
    softcap: float | None
    queries: tuple[int, ...]


@dataclass(frozen=True)
class Watched:
    """What was seen of one model; L blocks, M images, Q queries."""

    reach: Reach  # each [M, L, H] fp64, on the CPU
    spectra: dict[str, Spectrum]
    """Of the mean patch token of every image: "block 1" .. "block L", and "final norm" where there is one."""
    maps: np.ndarray  # [pictures, Q, H, rows, columns] fp32, of the last block
    pixels: np.ndarray  # [pictures, height, width, 3] uint8: what the model saw


@dataclass(frozen=True)
class Seen:
    """All models on the same images."""

    models: dict[str, Watched]
    images: int
    names: tuple[str, ...]
    """Of the pictures."""
    unreadable: dict[str, str]


def patch_at(point: Point, grid: tuple[int, int]) -> int:
    """The patch that holds a point."""
    row, column = (min(int(at * n), n - 1) for at, n in zip(point, grid, strict=True))
    return row * grid[1] + column


def chosen_images(count: int, limit: int, seed: int) -> Tensor:
    """Which images of `count` are looked at: all, or `limit` drawn from `seed`, [M] int64 in a drawn order.

    The first ones of class folders would be of one class.
    """
    return permute(torch.arange(min(count, limit)), count, seed, 0, "analyze.images")


@torch.inference_mode()
def watch(
    source: Source, models: Mapping[str, Model], reading: Reading, *, limit: int, pictures: int, seed: int
) -> Seen:
    """Every model on at most `limit` images of `source`, each read once; maps of the first `pictures`.

    Raises UserError where fewer than two images can be read, for features that are not finite, and for blocks whose
    attention is not known.
    """
    views: dict[View, str] = {}
    of = {name: views.setdefault(evaluation_view(one.backbone), f"view{len(views)}") for name, one in models.items()}
    for one in models.values():
        check_maps(one.backbone)
        one.backbone.to(reading.device)
    chosen = chosen_images(len(source), limit, seed)
    loader = Loader(
        source,
        ImageSpec({name: view for view, name in views.items()}, records=True),
        seed=seed,  # draws nothing: these views have neither random crops nor flips
        workers=0 if len(chosen) <= FEW else reading.workers,
        device=reading.device,
        decoder=reading.decoder,
        instead="it is left out",
    )
    watchers = {name: _Watcher(name, one, reading, pictures) for name, one in models.items()}
    names: list[str] = []
    count, start, told = 0, perf_counter(), perf_counter()
    for batch in loader.sequential(0, chosen.split(reading.batch_size)):
        # a row of another index stands in for an unreadable one
        read = (batch["position"] == batch["index"]).nonzero()[:, 0]
        names += [batch["records"][row].name for row in read.tolist()][: pictures - len(names)]
        for name, watcher in watchers.items():
            watcher.add(batch["views"][of[name]][read])
        count += len(read)
        if perf_counter() - told > EVERY:
            told = perf_counter()
            log.info("%d of %d images, %.1f a second", count, len(chosen), count / (told - start))
    if count < 2:
        raise UserError(
            f"an analysis was asked for of {len(chosen)} images, of which {count} could be read. A covariance needs "
            "two at least: give more --data, or a larger --images."
        )
    seen = {name: watcher.result() for name, watcher in watchers.items()}
    return Seen(seen, count, tuple(names), dict(loader.replaced.names))


class _Watcher:
    """One model's sums over batches."""

    def __init__(self, name: str, model: Model, reading: Reading, pictures: int) -> None:
        self.name, self.model, self.reading, self.pictures = name, model, reading, pictures
        backbone = model.backbone
        self.distances = pairwise_distances(backbone.grid, reading.device)
        layers = [f"block {i + 1}" for i in range(backbone.depth)] + ["final norm"] * backbone.has_final_norm
        self.covariances = {layer: Covariance() for layer in layers}
        self.reaches: list[Reach] = []
        self.maps: list[Tensor] = []
        self.pixels: list[np.ndarray] = []

    def add(self, images: Tensor) -> None:
        """images [B, 3, H, W], normalised."""
        if not len(images):
            return
        backbone, wanted = self.model.backbone, self.pictures - sum(map(len, self.maps))
        queries = [backbone.num_prefix_tokens + query for query in self.model.queries]
        found: list[Reach] = []
        with torch.autocast(self.reading.device.type, torch.bfloat16, enabled=self.reading.precision == "bf16"):
            for layer in layer_by_layer(backbone, images, self.model.softcap):
                parts, kept = [], wanted if layer.number == backbone.depth - 1 else 0
                for attention in layer.attention():
                    parts.append(reach(attention, self.distances))
                    if kept > 0:
                        shown = attention[:kept, :, queries, backbone.num_prefix_tokens :]
                        self.maps.append(shown.transpose(1, 2).unflatten(-1, backbone.grid).float().cpu())
                        kept -= len(shown)
                found.append(Reach(*(torch.cat(one) for one in zip(*parts, strict=True))))
                self._spread(f"block {layer.number + 1}", layer.output)
            if backbone.has_final_norm:
                self._spread("final norm", backbone.final_norm(layer.output))
        self.reaches.append(Reach(*(torch.stack(one, 1).cpu() for one in zip(*found, strict=True))))
        if wanted > 0:
            self.pixels.append(_pixels(images[:wanted], backbone))

    def _spread(self, layer: str, tokens: Tensor) -> None:
        rows = tokens[:, self.model.backbone.num_prefix_tokens :].double().mean(1)
        if not bool(rows.isfinite().all()):
            raise UserError(
                f"the features of {self.name} are not finite behind {layer}. Type --precision fp32; if they stay so, "
                "the weights are damaged."
            )
        self.covariances[layer].add(rows)

    def result(self) -> Watched:
        shape = (0, len(self.model.queries), self.model.backbone.num_heads, *self.model.backbone.grid)
        maps = torch.cat(self.maps).numpy() if self.maps else np.zeros(shape, np.float32)
        size = (0, *self.model.backbone.image_size, 3)
        return Watched(
            reach=Reach(*(torch.cat(one) for one in zip(*self.reaches, strict=True))),
            spectra={layer: spectrum(one) for layer, one in self.covariances.items()},
            maps=maps,
            pixels=np.concatenate(self.pixels) if self.pixels else np.zeros(size, np.uint8),
        )


def _pixels(images: Tensor, backbone: Backbone) -> np.ndarray:
    """Normalised images [B, 3, H, W] as uint8 [B, H, W, 3]."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    levels = ((images.float() * std + mean) * 255).round().clamp(0, 255)
    return levels.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def default_queries(grid: tuple[int, int]) -> Sequence[tuple[int, int]]:
    """The centre, and a quarter of the image from its corners: above on the left, below on the right."""
    rows, columns = grid
    return (rows // 2, columns // 2), (rows // 4, columns // 4), (rows - 1 - rows // 4, columns - 1 - columns // 4)
