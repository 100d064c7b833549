"""The embedded demo: probe a backbone, align it, probe it again, and show both beside each other.

`python -m locfast.train --method maskembed` with no other flag comes here; recipes/demo.yaml holds its settings. All of
it is the ordinary machinery: the engine trains, the probe measures, on scenes instead of photographs.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from locfast.config.base import TrainConfig
from locfast.config.files import default_out
from locfast.data.scenes import CLASSES, SceneSource
from locfast.engine.precision import pick_device
from locfast.engine.run import check_kernels, train
from locfast.engine.run_folder import RunFolder, load_method
from locfast.eval.features import Labelled, backbone_features, extract, read_labelled
from locfast.eval.labels import classes_in_patches
from locfast.eval.probe import ProbeConfig, Probed, predict, probe
from locfast.models.backbone import Backbone, load_backbone
from locfast.report import write_report

PROBE_STREAM = 10_000
"""Labelled scenes come from the stream PROBE_STREAM + seed; training scenes come from the stream `seed`."""
PICTURES = 8
"""Test scenes that the report shows."""


@dataclass(frozen=True)
class DemoProbe:
    """How many labelled scenes the demo probes with, and how its heads learn."""

    train: int = 1536
    validation: int = 512
    test: int = 2048
    heads: ProbeConfig = field(default_factory=lambda: ProbeConfig(lr=3e-3, batch_size=64, patience=2))

    def splits(self, seed: int, size: tuple[int, int]) -> dict[str, Labelled]:
        """Three runs of scenes of one stream that do not overlap."""
        counts = {"train": self.train, "validation": self.validation, "test": self.test}
        source, splits, start = SceneSource(sum(counts.values()), seed=PROBE_STREAM + seed), {}, 0
        for name, count in counts.items():
            splits[name] = read_labelled(source, range(start, start + count), size)
            start += count
        return splits


def run_demo(config: TrainConfig, settings: DemoProbe | None = None) -> Path:
    """Probe, align, probe again; print the table and write RUN/probe.json and RUN/report.html. Gives the run folder."""
    settings = settings or DemoProbe()
    folder = Path(config.out or default_out(config.method, config.model))
    RunFolder(folder).check(resume=config.resume, overwrite=config.overwrite)
    check_kernels(config)
    if int(os.environ.get("RANK", "0")) != 0:  # under torchrun all ranks train, the first one probes
        return train(config)
    console, begin = Console(), time.monotonic()
    device = pick_device(config.device)
    backbone = (
        load_backbone("demo", config.pretrained, seed=config.seed, image_size=config.image_size).to(device).eval()
    )
    splits = settings.splits(config.seed, backbone.image_size)
    console.print("Probing the backbone as it is: what do its patch embeddings tell of their place?")
    before = probe_backbone(backbone, None, splits, settings.heads, device)

    console.print(f"Aligning it with {config.method}.")
    path = train(config)
    method = load_method(path).to(device)
    made = method.artifacts()
    console.print("Probing the aligned backbone.")
    after = probe_backbone(made["backbone"], made["softcap"], splits, settings.heads, device)

    result = {
        "format": 1,
        "seed": config.seed,
        "scenes": {"stream": PROBE_STREAM + config.seed, "train": settings.train, "validation": settings.validation}
        | {"test": settings.test},
        "heads": asdict(settings.heads),
        "classes": list(CLASSES),
        "grid": list(backbone.grid),
        "before": summary(before),
        "after": summary(after),
        "pictures": _pictures(splits["test"], backbone, made, before, after, settings, device),
        "seconds": round(time.monotonic() - begin, 1),
    }
    aside = path / ".probe.json"
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path / "probe.json")
    report = write_report(path)
    console.print(table(result))
    console.print(f"{result['seconds']:.0f} s in all. Loss curve, bars and pictures: {report}", soft_wrap=True)
    return path


def probe_backbone(
    backbone: Backbone,
    softcap: float | None,
    splits: dict[str, Labelled],
    heads: ProbeConfig,
    device: torch.device | str = "cpu",
) -> dict[str, Probed]:
    """Probe a backbone on scenes, after its final norm and with its soft cap: {"local/linear": Probed, ...}."""
    features = backbone_features(backbone, softcap)
    return probe(features, splits, len(CLASSES), backbone.patch_size, backbone.num_heads, heads, device=device)


def summary(probed: dict[str, Probed]) -> dict[str, Any]:
    """What probe.json says of every head."""
    return {
        name: {
            "recall": one.test.recall,
            "precision": one.test.precision,
            "class_recall": one.test.class_recall,
            "validation_recall": one.validation.recall,
            "epochs": one.epochs,
            "best_epoch": one.best_epoch,
        }
        for name, one in probed.items()
    }


def table(result: dict[str, Any]) -> Table:
    """Recall before and after, side by side, in percent."""
    shown = Table(title="Macro recall on held-out scenes, %")
    for column in ("probe", "before", "after", "gain"):
        shown.add_column(column, justify="left" if column == "probe" else "right")
    for name, before in result["before"].items():
        old, new = 100 * before["recall"], 100 * result["after"][name]["recall"]
        shown.add_row(name.replace("/", ", ") + " head", f"{old:.2f}", f"{new:.2f}", f"{new - old:+.2f}")
    return shown


def _pictures(
    test: Labelled,
    backbone: Backbone,
    made: dict[str, Any],
    before: dict[str, Probed],
    after: dict[str, Probed],
    settings: DemoProbe,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The first test scenes: the classes truly in every patch, and the likeliest class before and after.

    By the linear head where there is one: it reads every embedding alone, so it shows what that embedding says.
    """
    local = next((name for name in ("local/linear", "local/transformer") if name in before), None)
    if local is None:
        return []
    few = test.images[:PICTURES]
    truth = classes_in_patches(test.label_map[:PICTURES], backbone.patch_size, len(CLASSES))
    answers = []
    for model, softcap, head in (
        (backbone, None, before[local].head),
        (made["backbone"], made["softcap"], after[local].head),
    ):
        tokens, _ = extract(backbone_features(model, softcap), few, device)
        answers.append(predict(head, tokens).argmax(-1).tolist())
    first = settings.train + settings.validation
    return [
        {
            "scene": first + i,
            "truth": [torch.nonzero(patch).flatten().tolist() for patch in truth[i]],
            "before": answers[0][i],
            "after": answers[1][i],
        }
        for i in range(len(few))
    ]
