"""What a probe leaves behind: DIR/probe.json, and counts by image, from which other figures are worked out."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from locfast.errors import UserError

SCHEMA = 1
FILE = "probe.json"


@dataclass(frozen=True)
class Counts:
    """How often every class was told, was told rightly and was there, image by image: [M, K] int32 each.

    Of a local head patches are counted, of a global one images (0 or 1).
    """

    hits: np.ndarray
    told: np.ndarray
    there: np.ndarray

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, hits=self.hits, told=self.told, there=self.there)

    @classmethod
    def read(cls, file: Path) -> Counts:
        """Raises UserError where the file is missing or cut short."""
        try:
            with np.load(file) as kept:
                return cls(kept["hits"], kept["told"], kept["there"])
        except Exception as error:  # numpy and zipfile have many
            raise UserError(f"{file}: not the counts of a probe ({type(error).__name__}); probe anew.") from None


@dataclass(frozen=True)
class HeadResult:
    """One trained head. Scores are shares of 1: recall, precision, f1 and ap, each a macro average."""

    task: str
    """local or global."""
    head: str
    """transformer, mlp or linear."""
    intervention: str
    """none; prefix: it saw the prefix tokens (or the mean) alone; anonymous: tokens without their places."""
    seed: int
    epochs: list[dict[str, Any]]
    """Of every epoch: "loss" of training, and "selection", the recall by which the state was chosen."""
    best_epoch: int
    """From 1; of which the state was kept."""
    selection: dict[str, float]
    """Scores on the images that chose the state."""
    validation: dict[str, float]
    """Scores on the validation split. What is reported."""
    classes: dict[str, list[float | None]]
    """By class, on the validation split: "recall", "precision", "f1", "ap"; None where no image has the class."""
    counts: str
    """File of the `Counts` on the validation split, relative to probe.json."""

    @property
    def key(self) -> str:
        """For example local/transformer, or local/transformer/prefix."""
        return "/".join([self.task, self.head, *([] if self.intervention == "none" else [self.intervention])])


@dataclass(frozen=True)
class Picture:
    """A validation image and what a local head says of its patches (of the first seed, no intervention)."""

    name: str
    image: str
    """File of what the backbone saw, relative to probe.json."""
    truth: list[list[int]]
    """Classes truly in every patch, row by row."""
    told: dict[str, list[list[int]]]
    """By head: the classes of every patch with a probability above one half."""
    likeliest: dict[str, list[int]]
    """By head: the likeliest class of every patch."""


@dataclass(frozen=True)
class ProbeResult:
    """Everything that a probe of one backbone measured."""

    model: str
    softcap: float | None
    data: str
    layout: str
    classes: list[str]
    things: list[int] | None
    unlabeled: int | None
    grid: tuple[int, int]
    image_size: tuple[int, int]
    images: dict[str, int]
    """How many images each split has: train, selection, validation."""
    settings: dict[str, Any]
    """Resolved, the protocol among them."""
    machine: dict[str, str]
    seconds: dict[str, float]
    """Where the time went: features, heads, scores, and in all."""
    heads: list[HeadResult]
    pictures: list[Picture]
    shares: str
    """File with "shares" [M, K] fp32: the share of each validation image's pixels that each class holds."""

    def of(self, key: str) -> list[HeadResult]:
        """The heads called `key`, one a seed."""
        return [one for one in self.heads if one.key == key]

    def keys(self) -> list[str]:
        """Names of its heads, in order, each once."""
        return list(dict.fromkeys(one.key for one in self.heads))


def write_result(result: ProbeResult, folder: Path) -> Path:
    """DIR/probe.json, whole or not at all."""
    from dataclasses import asdict

    aside = folder / f".{FILE}"
    aside.write_text(json.dumps({"schema": SCHEMA, **asdict(result)}, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, folder / FILE)
    return folder / FILE


def read_result(folder: Path) -> ProbeResult:
    """Raises UserError where `folder` holds no result of `python -m locfast.probe`."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if values.pop("schema") != SCHEMA:
            raise ValueError("of another version of locfast")
        heads = [HeadResult(**one) for one in values.pop("heads")]
        pictures = [Picture(**one) for one in values.pop("pictures")]
        grid, size = tuple(values.pop("grid")), tuple(values.pop("image_size"))
        return ProbeResult(**values, heads=heads, pictures=pictures, grid=grid, image_size=size)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {FILE}: give a folder that `python -m locfast.probe --out` wrote."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / FILE} is no result that this locfast reads ({error}); probe anew.") from None
