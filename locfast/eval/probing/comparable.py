"""Which probes may stand beside each other, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from locfast.errors import UserError, suggest
from locfast.eval.probing.results import Counts, ProbeResult, read_result

BACKBONE = ("model", "pretrained", "image_size", "softcap", "ema", "precision", "compile", "kernels")
PLACE = ("out", "overwrite", "device", "workers", "decoder", "features", "cache", "cache_dir", "feature_batch_size")
HEADS = ("heads", "tasks", "interventions", "seed", "seeds", "pictures")
FREE = frozenset(BACKBONE + PLACE + HEADS)
"""Settings in which probes may differ: what is probed, where and how fast, and the heads, of which pairs are taken."""
SAME_SIZE, OTHER_SIZE = 1e-4, 0.1
"""How far shares of pixels may differ between images of one size, or resized to two. Beyond, the images differ."""


@dataclass(frozen=True)
class Probed:
    """A probe's folder, opened, under the name by which a comparison calls it."""

    name: str
    folder: Path
    result: ProbeResult

    def counts(self, key: str, seeds: Sequence[int] | None = None) -> list[Counts]:
        """One `Counts` a seed, in the order of `seeds` (None: all, in their order)."""
        by_seed = {one.seed: one for one in self.result.of(key)}
        return [Counts.read(self.folder / by_seed[seed].counts) for seed in (by_seed if seeds is None else seeds)]

    def shares(self) -> np.ndarray:
        """The share of each validation image's pixels that each class holds, [M, K]; UserError where it is spoilt."""
        try:
            with np.load(self.folder / self.result.shares) as kept:
                return np.asarray(kept["shares"])
        except Exception as error:  # numpy and zipfile have many
            raise UserError(
                f"{self.folder / self.result.shares}: not the shares of a probe ({type(error).__name__}); probe anew."
            ) from None

    @property
    def aligned(self) -> bool:
        """Whether the backbone counts as aligned: it has a soft cap, or is what a run folder on this machine made."""
        given = str(self.result.settings.get("model", self.result.model))
        return self.result.softcap is not None or (Path(given) / "config.yaml").is_file()


def open_probes(folders: Sequence[Path]) -> list[Probed]:
    """Read the folders and name them: by model where that tells them apart, else by folder, else by path.

    Raises UserError for a folder that holds no probe, for one given twice, and for fewer than two.
    """
    if len(folders) < 2:
        raise UserError("--compare takes two folders or more, each written by `python -m locfast.probe --out`.")
    resolved = [Path(folder).resolve() for folder in folders]
    twice = next((one for one in resolved if resolved.count(one) > 1), None)
    if twice is not None:
        raise UserError(f"--compare: {twice} is given twice; give each probe once.")
    results = [read_result(Path(folder)) for folder in folders]
    ways = ([one.model for one in results], [one.name for one in resolved], [str(folder) for folder in folders])
    names = next(way for way in ways if len(set(way)) == len(way))
    return [Probed(*parts) for parts in zip(names, map(Path, folders), results, strict=True)]


def pick_baseline(probes: Sequence[Probed], given: str | None) -> Probed:
    """The probe that `given` names (by name, model or folder), or the first. Raises UserError where none or two fit."""
    if given is None:
        return probes[0]
    fits = [one for one in probes if given in (one.name, one.result.model, one.folder.name, str(one.folder))]
    if len(fits) != 1:
        known = ", ".join(one.name for one in probes)
        why = "several probes fit that" if fits else "no probe is called that"
        raise UserError(f"--baseline {given}: {why}{suggest(given, [p.name for p in probes])} There are: {known}.")
    return fits[0]


def check_alike(first: Probed, other: Probed) -> list[str]:
    """What a reader must know of the pair, as sentences. Raises UserError where data or protocol are not the same."""
    a, b = first.result, other.result
    for what, name in (
        ("other data", "data"),
        ("another layout of the data", "layout"),
        ("other numbers of images", "images"),
        ("other classes", "classes"),
        ("other things", "things"),
        ("another unlabeled class", "unlabeled"),
    ):
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            raise _unlike(first, other, what, *_shown(ours, theirs))
    missing = "(not set)"
    for name in sorted((a.settings.keys() | b.settings.keys()) - FREE):
        ours, theirs = a.settings.get(name, missing), b.settings.get(name, missing)
        if ours != theirs and name != "data":  # settings spell a path, `data` above says what it held
            raise _unlike(first, other, f"another protocol ({name})", ours, theirs)
    alike = (a.image_size, a.grid) == (b.image_size, b.grid)
    shares = first.shares(), other.shares()
    far = np.abs(shares[0] - shares[1]).max() if shares[0].shape == shares[1].shape else np.inf
    if far > (SAME_SIZE if a.image_size == b.image_size else OTHER_SIZE):
        raise _unlike(first, other, "other validation images or label maps", "its own", "others or in another order")
    if alike:
        return []
    return [
        f"{other.name} saw images of {_size(b.image_size)} in {_size(b.grid)} patches, {first.name} images of "
        f"{_size(a.image_size)} in {_size(a.grid)}: local figures are of other patches, and not quite comparable."
    ]


def shared_seeds(probes: Sequence[Probed], key: str) -> list[int]:
    """The seeds that every one of `probes` trained the head with. Raises UserError where there is none."""
    seeds = [[one.seed for one in probe.result.of(key)] for probe in probes]
    common = [seed for seed in seeds[0] if all(seed in other for other in seeds)]
    if not common:
        had = ", ".join(f"{p.name}: {' '.join(map(str, s))}" for p, s in zip(probes, seeds, strict=True))
        raise UserError(f"{key} heads have no seed in common ({had}): pairs need the same seeds; probe anew with them.")
    return common


def _unlike(first: Probed, other: Probed, what: str, ours: Any, theirs: Any) -> UserError:
    return UserError(
        f"{other.folder} cannot be compared with {first.folder}: it was probed with {what}. "
        f"{first.name}: {ours}; {other.name}: {theirs}. Probe both with the same data and settings."
    )


def _shown(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Both values, or of two long lists their lengths and the first entries that differ."""
    if not (isinstance(ours, list) and isinstance(theirs, list)):
        return ours, theirs
    at = next((i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), min(len(ours), len(theirs)))
    return tuple(f"{len(x)}, of which number {at} is {x[at]!r}" if at < len(x) else f"{len(x)}" for x in (ours, theirs))  # type: ignore[return-value]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
