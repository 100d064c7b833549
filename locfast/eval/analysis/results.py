"""What an analysis found, as plain values for a file and as tables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from locfast.eval.analysis.run import Seen, Watched
from locfast.eval.analysis.spectrum import log10_difference

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
FILE, MAPS, PICTURES, REPORT = "analyze.json", "maps.npz", "pictures", "report.html"
WRITTEN = (FILE, MAPS, PICTURES, REPORT)
"""What an analysis leaves in its folder, and all that may be replaced there."""


def described(seen: Seen, against: Mapping[str, str]) -> dict[str, Any]:
    """Every figure. against: {model: the model whose spectrum is taken from its own}."""
    return {
        "models": {name: {"distance": _distance(one), "spectrum": _spectrum(one)} for name, one in seen.models.items()},
        "differences": [
            {
                "model": name,
                "against": other,
                "log10": {
                    layer: log10_difference(one, seen.models[other].spectra[layer]).tolist()
                    for layer, one in seen.models[name].spectra.items()
                    if layer in seen.models[other].spectra
                },
            }
            for name, other in against.items()
        ],
    }


def _distance(one: Watched) -> dict[str, Any]:
    """Means over images by layer and head; of a layer (the mean of its heads) the standard error over images too."""
    by_layer = one.reach.distance.mean(-1)
    return {
        "by_head": one.reach.distance.mean(0).tolist(),
        "by_layer": by_layer.mean(0).tolist(),
        "standard_error": (by_layer.std(0) / len(by_layer) ** 0.5).tolist(),
        "among_patches_by_head": one.reach.among_patches.mean(0).tolist(),
        "to_prefix_by_head": one.reach.to_prefix.mean(0).tolist(),
    }


def _spectrum(one: Watched) -> dict[str, Any]:
    return {
        layer: {"singular_values": found.values.tolist(), "effective_rank": found.effective_rank}
        for layer, found in one.spectra.items()
    }


def write_results(out: Path, seen: Seen, told: Mapping[str, Any]) -> Path:
    """OUT/analyze.json, maps.npz (an array a model, [pictures, queries, heads, rows, columns]) and pictures/.

    Pictures are what the first model saw. The JSON comes last and at once, so that where it stands the others do.
    """
    from PIL import Image

    first = next(iter(seen.models.values()))
    (out / PICTURES).mkdir(exist_ok=True)
    for old in (out / PICTURES).iterdir():
        old.unlink()
    for number, pixels in enumerate(first.pixels):
        Image.fromarray(pixels).save(out / PICTURES / f"{number:02}.png")
    maps: dict[str, Any] = {f"model{i}": one.maps for i, one in enumerate(seen.models.values())}
    np.savez_compressed(out / MAPS, **maps)
    aside = out / f".{FILE}"
    aside.write_text(json.dumps({"schema": SCHEMA, **told}, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, out / FILE)
    return out / FILE


def tables(found: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """(caption, table): attention distance and effective rank, a row a layer, models side by side."""
    from rich.table import Table

    models = found["models"]
    distance, rank = Table(), Table()
    for table in (distance, rank):
        table.add_column("behind" if table is rank else "block", justify="left")
        for name in models:
            table.add_column(name, justify="right", overflow="fold")
    for row in range(max(len(one["distance"]["by_layer"]) for one in models.values())):
        cells = []
        for one in models.values():
            heads = one["distance"]["by_head"][row : row + 1]
            mean = one["distance"]["by_layer"][row : row + 1]
            cells.append(f"{mean[0]:.3f}\n{min(heads[0]):.3f} to {max(heads[0]):.3f}" if mean else "")
        distance.add_row(str(row + 1), *cells)
    layers = dict.fromkeys(layer for one in models.values() for layer in one["spectrum"])
    for layer in sorted(layers, key=lambda name: int(name.removeprefix("block ")) if name != "final norm" else 10**6):
        cells = [
            f"{one['spectrum'][layer]['effective_rank']:.1f}" if layer in one["spectrum"] else ""
            for one in models.values()
        ]
        rank.add_row(layer, *cells)
    return [
        ("average attention distance, image side = 1: mean of heads, least to largest head below", distance),
        ("effective rank of the mean patch tokens' covariance over images", rank),
    ]
