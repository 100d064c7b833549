"""Frozen features of images: every image is read once for all backbones, through the data room's loader."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, get_args

import torch
from torch import Tensor, nn

from locfast.data.assemble import Batch
from locfast.data.loader import Loader
from locfast.data.sources.class_folder import ClassFolder
from locfast.data.sources.split import sample_name
from locfast.data.spec import CropPolicy, ImageSpec, Source, View
from locfast.errors import UserError
from locfast.eval.global_ability.pooling import Embed
from locfast.models.backbone import Backbone

log = logging.getLogger("locfast")

EVERY = 10.0
"""Seconds between two lines that tell how far it is."""
FEW = 128
"""Up to this many images are decoded faster here than worker processes start."""


@dataclass(frozen=True)
class Tower:
    """A backbone, how its features are taken, and what of its tokens stands for the image."""

    backbone: Backbone
    softcap: float | None
    embed: Embed


@dataclass(frozen=True)
class Reading:
    """How images are read and in what precision backbones compute (fp32, or bf16 by autocast)."""

    device: torch.device
    precision: str = "fp32"
    batch_size: int = 128
    workers: int | None = None
    decoder: str = "auto"


@dataclass(frozen=True)
class Features:
    """What could be read of a source, in its order."""

    features: dict[str, Tensor]  # by tower: [M, C] fp32, on the CPU
    index: Tensor  # [M] int64, places in the source
    unreadable: dict[str, str]
    """Files that could not be read, and why. No other image stands in for them."""
    texts: list[tuple[str, ...]]
    """Of every image, where they were asked for."""

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class ImageFeatures(Features):
    """What could be read of a class folder."""

    labels: Tensor  # [M] int64


def evaluation_view(backbone: Backbone) -> View:
    """The backbone's own evaluation transform."""
    crop = backbone.model.pretrained_cfg.get("crop_mode") or "center"
    crop = "pad" if crop == "border" else crop  # timm's word
    if crop not in get_args(CropPolicy):
        log.warning("%s: its config asks for the crop %r, which locfast lacks; taking center", backbone.name, crop)
        crop = "center"
    return View(
        size=backbone.image_size,
        mean=backbone.mean,
        std=backbone.std,
        crop=crop,  # type: ignore[arg-type]  # checked above
        crop_pct=backbone.crop_pct,
        interpolation=backbone.interpolation,  # type: ignore[arg-type]  # checked by Backbone
    )


def image_features(source: ClassFolder, towers: Mapping[str, Tower], reading: Reading) -> ImageFeatures:
    """`read_features` of class folders. Raises UserError, too, where no image of a class can be read."""
    read = read_features(source, towers, reading)
    labels = torch.from_numpy(source.labels)[read.index]
    _check_every_class(source, labels, read.unreadable)
    return ImageFeatures(**vars(read), labels=labels)


@torch.inference_mode()
def read_features(source: Source, towers: Mapping[str, Tower], reading: Reading, *, texts: bool = False) -> Features:
    """Features of every readable image, by tower; towers with the same transform see the very same pixels.

    texts: of every image too; one without a text counts as unreadable. Raises UserError where features are not finite.
    """
    views: dict[View, str] = {}
    of = {
        name: views.setdefault(evaluation_view(tower.backbone), f"view{len(views)}") for name, tower in towers.items()
    }
    for tower in towers.values():
        move(tower, reading.device)
    spec = ImageSpec({name: view for view, name in views.items()}, records=texts, text=texts)
    loader = evaluation_loader(source, spec, reading)
    parts: dict[str, list[Tensor]] = {name: [] for name in towers}
    found: list[tuple[str, ...]] = []
    indices = []
    for batch, read in readable(loader, torch.arange(len(source)), reading):
        indices.append(batch["index"][read].cpu())
        if texts:
            found += [batch["records"][row].texts for row in read.tolist()]
        for name, tower in towers.items():
            parts[name].append(tower.embed(tokens_of(tower, batch["views"][of[name]][read], reading)).cpu())
    index = torch.cat(indices)
    features = {name: torch.cat(parts.pop(name)) for name in towers}
    for name, values in features.items():
        check_finite(name, values, source, index)
    return Features(features, index, dict(loader.replaced.names), found)


def move(tower: Tower, device: torch.device) -> None:
    """Bring a backbone, and what it is embedded by, to `device`."""
    tower.backbone.to(device)
    for part in (tower.embed, getattr(tower.embed, "__self__", None)):  # a module, or a method of one
        if isinstance(part, nn.Module):
            part.to(device)


def evaluation_loader(source: Source, spec: ImageSpec, reading: Reading) -> Loader:
    """Of views that draw nothing: neither random crops nor flips."""
    return Loader(
        source,
        spec,
        seed=0,
        workers=0 if len(source) <= FEW else reading.workers,
        device=reading.device,
        decoder=reading.decoder,
        instead="it is left out",
    )


def readable(loader: Loader, indices: Tensor, reading: Reading) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of the samples `indices` [M], and which rows of each hold what was asked for; says how far it is."""
    start = told = perf_counter()
    where, done = getattr(loader.source, "root", repr(loader.source)), 0
    for batch in loader.sequential(0, indices.split(reading.batch_size)):
        # a row of another index stands in for an unreadable one
        yield batch, (batch["position"] == batch["index"]).nonzero()[:, 0]
        done += len(batch["index"])
        if perf_counter() - told > EVERY:
            told = perf_counter()
            log.info("%d of %d images of %s, %.0f a second", done, len(indices), where, done / (told - start))


def tokens_of(tower: Tower, images: Tensor, reading: Reading) -> Tensor:
    """images [B, 3, H, W], normalised -> [B, T, C] fp32, behind the final norm."""
    if not len(images):
        return images.new_zeros(0, tower.backbone.num_tokens, tower.backbone.embed_dim)
    with torch.autocast(reading.device.type, dtype=torch.bfloat16, enabled=reading.precision == "bf16"):
        return tower.backbone.forward_features(images, softcap=tower.softcap).float()


def check_finite(name: str, values: Tensor, source: Source, index: Tensor) -> None:
    """Raise UserError where a row of values [M, C] is not finite; index [M]: places in the source."""
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite().all(1)).nonzero()[0, 0])
        raise UserError(
            f"the features of {name} are not finite, first at {sample_name(source, int(index[bad]))}. Type "
            "--precision fp32; if they stay so, the weights are damaged."
        )


def _check_every_class(source: ClassFolder, labels: Tensor, unreadable: Mapping[str, Any]) -> None:
    there = torch.bincount(labels, minlength=len(source.classes))
    if gone := [name for name, count in zip(source.classes, there.tolist(), strict=True) if not count]:
        raise UserError(
            f"no image of the class {gone[0]} in {source.root} can be read, first {next(iter(unreadable))}. "
            f"`python -m locfast.data stats {source.root}` names all that are damaged."
        )
