"""One pass over a split: the labels of every image, and its tokens where they can be held."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.eval.probing import cache
from locfast.eval.probing.images import Images
from locfast.eval.probing.settings import Labels
from locfast.eval.probing.targets import Targets
from locfast.eval.probing.tokens import KEPT, Featurizer, Held, Live, Tokens, kept, room

Keep = Literal["auto", "memory", "cache", "live"]
PASS = 64
"""Images that a backbone sees at a time."""


@dataclass(frozen=True)
class Backbones:
    """What a backbone makes of an image, and what tells it from others."""

    featurize: Featurizer
    tokens: int
    """T = P + N."""
    width: int
    patch_size: tuple[int, int]
    key: dict[str, object]
    """Facts that change with its tokens: weights, soft cap, precision."""


@dataclass(frozen=True)
class Gathered:
    tokens: Tokens
    targets: Targets
    how: str
    """Where the tokens are, for the output."""
    seconds: float

    @property
    def on_device(self) -> int:
        """Bytes of tokens in the device's memory."""
        values = getattr(self.tokens, "values", None)
        return values.nbytes if isinstance(values, Tensor) else 0


def gather(images: Images, backbone: Backbones, labels: Labels, keep: Keep, folder: Path | None, held: int) -> Gathered:
    """Labels and tokens of all images. `held`: bytes that tokens of other splits take on the device already.

    auto: a cache where a folder is given, memory where tokens take less than half of what is free, else live. Tokens
    of a cache come into the device's memory where it has room. Raises UserError where an image cannot be read.
    """
    begun = time.monotonic()
    shape = (len(images), backbone.tokens, backbone.width)
    size = shape[0] * shape[1] * shape[2] * KEPT.itemsize
    fits = size + held <= room(images.device) + held // 2
    if keep == "auto":
        keep = "cache" if folder is not None else "memory" if fits else "live"
    if keep == "cache":
        if folder is None:
            raise UserError("--features cache: say where, with --cache DIR.")
        facts = {**backbone.key, "data": images.key(), "labels": labels, "unlabeled": images.split.unlabeled}
        place = cache.folder_of(folder, **facts)
        found = cache.read(place)
        if found is None:
            _fill(place, images, backbone, labels, shape)
            found = cache.read(place)
            if found is None:
                raise UserError(f"{place}: written, and not read back; is the disk full or failing?")
            how = f"written to {place}"
        else:
            how = f"read from {place}"
        values, targets = found
        source = torch.from_numpy(values).to(images.device) if fits and images.device.type == "cuda" else values
        return Gathered(Held(source, images.device), targets.to(images.device), how, time.monotonic() - begun)
    if keep == "memory":
        values_on_device = torch.empty(shape, dtype=KEPT, device=images.device)
        parts = []
        for rows, tokens, target in _pass(images, backbone, labels):
            values_on_device[rows.to(images.device)] = kept(tokens)
            parts.append(target)
        return Gathered(Held(values_on_device, images.device), _joined(parts), "in memory", time.monotonic() - begun)
    parts = [target for *_, target in _pass(images, backbone, labels, tokens=False)]
    how = "computed anew in every epoch"
    return Gathered(Live(images, backbone.featurize), _joined(parts), how, time.monotonic() - begun)


def _fill(place: Path, images: Images, backbone: Backbones, labels: Labels, shape: tuple[int, int, int]) -> None:
    writer = cache.Writer(place, shape)
    try:
        parts = []
        for rows, tokens, target in _pass(images, backbone, labels):
            writer.write(rows, kept(tokens))
            parts.append(target)
        writer.finish(_joined(parts))
    except BaseException:
        writer.abandon()
        raise


def _pass(
    images: Images, backbone: Backbones, labels: Labels, tokens: bool = True
) -> Iterator[tuple[Tensor, Tensor, Targets]]:
    """Rows, tokens (none where they are not asked for) and targets of all images, in order."""
    split = images.split
    for batch in images.batches(torch.arange(len(images)).split(PASS)):
        with torch.inference_mode():
            made = backbone.featurize(batch.pixels) if tokens else batch.pixels[:0]
        target = Targets.of(batch.label_map, backbone.patch_size, len(split.classes), split.unlabeled, labels)
        yield batch.rows, made, target


def _joined(parts: list[Targets]) -> Targets:
    local, whole, shares = (torch.cat([getattr(part, name) for part in parts]) for name in ("local", "whole", "shares"))
    return Targets(local, whole, shares, parts[0].num_classes)
