"""CLOC's embedded demo: what regions' own loss and a prompter add to CLIP, on scenes with boxes and phrases.

`python -m locfast.train --method cloc` with no other flag comes here; recipes/demo_cloc.yaml holds its settings. The
same towers are trained three times from the same weights, on the same batches, for as many steps: with the prompter,
with RoI-align in its place (CLOC, table 2), and by CLIP's loss alone.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from locfast.config.base import TrainConfig
from locfast.config.registry import method_config
from locfast.demo.figures import Figure, check_out, finish
from locfast.demo.regions import NAMES, Known, TestScenes, figures_of, iou, known
from locfast.engine.precision import pick_device
from locfast.engine.run import train
from locfast.engine.run_folder import load_method
from locfast.methods.cloc import Cloc

TEST_STREAM = 40_000
"""Scenes that models are judged on come from this stream + seed."""
PICTURES = 8
"""Test scenes that the report shows: the first ones with two objects or more that each have a phrase of their own."""
COLUMNS = ("RoI-align", "prompter", "CLIP alone")


@dataclass(frozen=True)
class Settings:
    """How much the demo measures with."""

    test: int = 2048


def run_demo(config: TrainConfig, settings: Settings | None = None) -> Path:
    """Train the three, measure them into RUN/demo.json, draw boxes into the report. Gives the run folder."""
    settings = settings or Settings()
    out = check_out(config)
    console, begin = Console(), time.monotonic()
    device = pick_device(config.device)
    roi = changed(config, prompter="roi", grounding=False)
    runs = {
        "prompter": config,
        "roi": dataclasses.replace(roi, out=str(out / "roi")),
        "clip": dataclasses.replace(changed(roi, region_weight=0.0), out=str(out / "clip")),
    }
    told = {"roi": "Now with RoI-align in the prompter's place.", "clip": "Now by CLIP's loss alone."}
    folders, seconds = {}, {}
    for name, one in runs.items():
        console.print(told.get(name, "Training with the prompter."))
        started = time.monotonic()
        folders[name] = train(one)
        seconds[name] = round(time.monotonic() - started, 1)

    console.print("Measuring the three.")
    scenes = TestScenes.of(TEST_STREAM + config.seed, settings.test, device)
    found, figures = {}, {}
    for name, folder in folders.items():
        method = load_method(folder).to(device)
        assert isinstance(method, Cloc)
        found[name] = known(method, scenes, plain=name == "clip")
        figures[name] = figures_of(found[name], scenes)
    table = [
        Figure(name, *(figures[who].get(name) for who in ("roi", "prompter", "clip"))) for name in figures["prompter"]
    ]
    more = {
        "steps": config.steps,
        "seconds": seconds,
        "scenes": {"stream": TEST_STREAM + config.seed, "test": settings.test, "regions": len(scenes.boxes)},
        "same_box_always": same_box_always(scenes),
        "boxes": boxes_shown(found["prompter"], scenes),
    }
    return finish(folders["prompter"], config, console, table, COLUMNS, more, time.monotonic() - begin)


def changed(config: TrainConfig, **fields: Any) -> TrainConfig:
    """The same run with other fields of CLOC's."""
    own: Any = method_config(config)
    replaced: dict[str, Any] = {config.method: dataclasses.replace(own, **fields)}
    return dataclasses.replace(config, **replaced)


def same_box_always(scenes: TestScenes) -> dict[str, float]:
    """What a grounding that does not look would reach: the mean of all true boxes as every answer, in percent."""
    overlap = iou(scenes.boxes.mean(0).expand_as(scenes.boxes), scenes.boxes)[scenes.unique]
    return {"mean IoU": 100 * overlap.mean().item(), "IoU > 0.5": 100 * (overlap > 0.5).float().mean().item()}


def boxes_shown(found: Known, scenes: TestScenes) -> list[dict[str, Any]]:
    """By scene: every phrase, the box it was answered with, the true one, and their IoU; boxes in [0, 1]."""
    if found.boxes is None:
        return []
    overlap, shown = iou(found.boxes, scenes.boxes), []
    for scene in range(len(scenes.images)):
        own = torch.nonzero(scenes.scene == scene).flatten()
        if len(own) < 2 or not scenes.unique[own].all():
            continue
        asked = [
            {
                "phrase": NAMES[scenes.phrase[region]],
                "box": found.boxes[region].tolist(),
                "truth": scenes.boxes[region].tolist(),
                "iou": overlap[region].item(),
            }
            for region in own.tolist()
        ]
        shown.append({"scene": scene, "asked": asked})
        if len(shown) == PICTURES:
            break
    return shown
