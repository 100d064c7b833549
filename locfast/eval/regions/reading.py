"""Embeddings of boxes: every image is read once for all models and all readings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from locfast.data.regions.in_view import regions_in_view
from locfast.data.spec import CropPolicy, Geometry, ImageSpec, Record, Source, View
from locfast.errors import UserError
from locfast.eval.global_ability.features import (
    Features,
    Reading,
    Tower,
    check_finite,
    evaluation_loader,
    evaluation_view,
    move,
    readable,
    tokens_of,
)
from locfast.eval.regions.readings import RegionReading, embed_boxes
from locfast.models.backbone import Backbone

CHUNK = 64
"""Boxes that a prompter is asked about at a time: its MLP's activations are 150 MB for B/16 at 224 px."""
ANOTHER_SIZE, ANOTHER_VIEW = "image of another size than listed", "not shown to another model"


@dataclass(frozen=True)
class Looker:
    """A model, how it looks at an image, and its readings of boxes."""

    tower: Tower
    crop: CropPolicy
    readings: Mapping[str, RegionReading]

    @property
    def view(self) -> View:
        return region_view(self.tower.backbone, self.crop)


@dataclass(frozen=True)
class RegionFeatures(Features):
    """What could be read: `features` and `texts` are of whole images, R is the number of regions in sight of all."""

    regions: dict[tuple[str, str], Tensor]  # by model and reading: [R, E] fp32, on the CPU
    phrases: list[str]  # [R]
    image_of: Tensor  # [R] int64: row of `index`
    left_out: dict[str, dict[str, int]]
    """Regions that were not asked about: by model, reasons that occurred and their counts."""


def region_view(backbone: Backbone, crop: CropPolicy) -> View:
    """A backbone's evaluation transform with another crop policy."""
    return replace(evaluation_view(backbone), crop=crop)


@torch.inference_mode()
def read_regions(source: Source, lookers: Mapping[str, Looker], reading: Reading, indices: Tensor) -> RegionFeatures:
    """Embeddings of images and regions of the samples `indices` [M] of a source.

    A region of which a model's view shows no part, or that is none (`regions_in_view`), is left out for all models, so
    that all answer the same questions; however little a view shows or however small it is, it counts. Where the source
    knows `sizes` of its images, boxes in an image of another size are left out: they lie elsewhere. Raises UserError
    where no region is left and where embeddings are not finite.
    """
    views: dict[View, str] = {}
    of = {name: views.setdefault(looker.view, f"view{len(views)}") for name, looker in lookers.items()}
    for looker in lookers.values():
        move(looker.tower, reading.device)
        for part in looker.readings.values():
            if isinstance(part, nn.Module):
                part.to(reading.device)
    spec = ImageSpec({name: view for view, name in views.items()}, records=True)
    loader = evaluation_loader(source, spec, reading)
    images: dict[str, list[Tensor]] = {name: [] for name in lookers}
    regions: dict[tuple[str, str], list[Tensor]] = {(n, how): [] for n, one in lookers.items() for how in one.readings}
    index, image_of, texts, phrases = [], [], list[tuple[str, ...]](), list[str]()
    counts: dict[str, Counter[str]] = {name: Counter() for name in views.values()}
    resized = 0
    for batch, read in readable(loader, indices, reading):
        own = batch["index"][read].cpu()
        index.append(own)
        geometry = {name: _rows(each, read.cpu()) for name, each in batch["geometry"].items()}
        given = [batch["records"][row] for row in read.tolist()]
        records = _as_listed(given, geometry["view0"], getattr(source, "sizes", None), own)
        resized += sum(len(one.regions or ()) for one in given) - sum(len(one.regions or ()) for one in records)
        seen = _seen(records, geometry, counts)
        image_of.append(len(texts) + seen.rows)
        texts += [record.texts for record in records]
        phrases += seen.phrases
        for name, looker in lookers.items():
            tokens = tokens_of(looker.tower, batch["views"][of[name]][read], reading)
            images[name].append(looker.tower.embed(tokens).cpu())
            if len(seen.rows):
                patches = tokens[:, looker.tower.backbone.num_prefix_tokens :]
                boxes, rows = seen.boxes[of[name]].to(reading.device), seen.rows.to(reading.device)
                for how, one in looker.readings.items():
                    regions[name, how].append(embed_boxes(one, patches, boxes, rows, CHUNK).cpu())
    told = {name: {**counts[of[name]], **({ANOTHER_SIZE: resized} if resized else {})} for name in lookers}
    if not phrases:
        raise UserError(f"none of the regions of {source!r} can be asked about: {told}.")
    place, whose = torch.cat(index), torch.cat(image_of)
    features = {name: torch.cat(parts) for name, parts in images.items()}
    found = {key: torch.cat(parts) for key, parts in regions.items()}
    for name, values in features.items():
        check_finite(name, values, source, place)
    for (name, how), values in found.items():
        check_finite(f"{name} ({how})", values, source, place[whose])
    return RegionFeatures(features, place, dict(loader.replaced.names), texts, found, phrases, whose, told)


class _Seen(NamedTuple):
    """The regions of a batch that every view shows."""

    rows: Tensor  # [K] int64, of the batch's records
    phrases: list[str]  # [K]
    boxes: dict[str, Tensor]  # by view: [K, 4] in [0, 1]


def _seen(records: Sequence[Record], geometry: Mapping[str, Geometry], left_out: Mapping[str, Counter[str]]) -> _Seen:
    """Carry the regions of `records` into every view, and count in `left_out`, by view, those not to be asked about."""
    said = [[region.text for region in record.regions or ()] for record in records]
    lengths = torch.tensor([len(own) for own in said], dtype=torch.int64)
    first, total = lengths.cumsum(0) - lengths, int(lengths.sum())
    boxes, shown = {}, {}
    for name, reasons in left_out.items():
        found = regions_in_view(records, geometry[name], min_shown=0.0, min_side=0.0)
        row, slot = (found.which >= 0).nonzero(as_tuple=True)
        at = first[row] + found.which[row, slot]
        boxes[name] = torch.zeros(total, 4).index_copy(0, at, found.boxes[row, slot])
        shown[name] = torch.zeros(total, dtype=torch.bool).index_fill(0, at, True)
        reasons.update({reason: count for reason, count in found.dropped.items() if count})
    kept = torch.stack(list(shown.values())).all(0)
    for name, own in shown.items():
        if alone := int((own & ~kept).sum()):
            left_out[name].update({ANOTHER_VIEW: alone})
    rows = torch.repeat_interleave(torch.arange(len(records)), lengths)[kept]
    phrases = [text for text, asked in zip(chain.from_iterable(said), kept.tolist(), strict=True) if asked]
    return _Seen(rows, phrases, {name: own[kept] for name, own in boxes.items()})


def _as_listed(records: Sequence[Record], geometry: Geometry, sizes: np.ndarray | None, index: Tensor) -> list[Record]:
    """Without the regions of images that are not as large as their source has them; None: it does not say."""
    if sizes is None:
        return list(records)
    same = (geometry.source_size == torch.from_numpy(sizes)[index]).all(1).tolist()
    return [one if fits else replace(one, regions=None) for one, fits in zip(records, same, strict=True)]


def _rows(geometry: Geometry, rows: Tensor) -> Geometry:
    return replace(geometry, **{name: value[rows] for name, value in vars(geometry).items() if name != "size"})
