"""The report of a run folder: loss, settings and, of a demo, the probe before and after or boxes of phrases."""

from __future__ import annotations

import json
import statistics
from html import escape
from pathlib import Path
from typing import Any

from locfast.report.charts import Value, dots, legend, lines, percent
from locfast.report.grounding import boxes_of_phrases
from locfast.report.page import data_uri, figure, figures, page, paragraph, section, table, tiles

CURVES = {"loss": "training", "val/loss": "held out", "loss/all_visible": "all patches visible"}
"""Columns of metrics.jsonl that the chart of the loss shows."""
WHEN = ("before", "after")


def run_page(run: Path) -> str:
    """Everything that config.yaml, metrics.jsonl and, where there is one, a demo's probe.json or demo.json tell."""
    from locfast.engine.run_folder import RunFolder

    folder = RunFolder(run)
    metrics = folder.read_metrics()
    probe_file = run / "probe.json"
    probed = json.loads(probe_file.read_text(encoding="utf-8")) if probe_file.is_file() else {}
    demo = probed if "before" in probed else None
    parts = [_recall(demo) if demo else "", _loss(metrics), _pictures(demo) if demo else ""]
    told_file = run / "demo.json"
    told = json.loads(told_file.read_text(encoding="utf-8")) if told_file.is_file() else {}
    if "boxes" in told:
        parts.append(boxes_of_phrases(told["boxes"], told["scenes"]["stream"]))
    parts.append(
        section("Settings", f"<figure><pre>{escape(folder.config.read_text(encoding='utf-8'))}</pre></figure>")
    )
    return page(run.resolve().name, "locfast run", _lede(metrics, demo), parts)


def _lede(metrics: list[dict[str, Any]], demo: dict[str, Any] | None) -> str:
    shown = []
    for name in demo["before"] if demo else ():
        old, new = (demo[when][name]["recall"] for when in WHEN) if demo else (0.0, 0.0)
        label = f"{name.replace('/', ' recall, ')} head, points"
        shown.append((label, percent(new - old, True), f"{percent(new)} % after against {percent(old)} % before"))
    last = paragraph(f"The last logged step is {metrics[-1]['step']}.", "lede") if metrics else ""
    return last + tiles(shown)


def _loss(metrics: list[dict[str, Any]]) -> str:
    curves = {
        shown: [(float(line["step"]), Value(float(line[name]))) for line in metrics if name in line]
        for name, shown in CURVES.items()
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    chart = lines(curves, "step", "loss")
    if not chart:
        return section("Loss", paragraph("No step was logged yet."))
    rows = []
    for name, curve in curves.items():
        values = [v.value for _, v in curve]
        tail = values[-max(1, len(values) // 10) :]
        rows.append([name, str(len(values)), *(f"{v:.4g}" for v in (values[0], min(values), statistics.mean(tail)))])
    told = table("Loss as logged", ["curve", "points", "first", "lowest", "mean of the last tenth"], rows)
    caption = "As logged in metrics.jsonl. The scale is logarithmic where values span more than a decade."
    return section("Loss", figures(figure(chart, caption, legend(list(curves)), told)))


def _recall(demo: dict[str, Any]) -> str:
    order = [f"{task}/{kind}" for task in ("local", "global") for kind in ("transformer", "linear")]
    heads = [name for name in order if name in demo["before"]]
    recall = {name: [demo[when][name]["recall"] for when in WHEN] for name in heads}
    rows = [(name.replace("/", ", ") + " head", {0: Value(old), 1: Value(new)}) for name, (old, new) in recall.items()]
    told = table(
        "Macro recall, %",
        ["head", *WHEN, "gain"],
        [
            [name.replace("/", ", "), percent(old), percent(new), percent(new - old, True)]
            for name, (old, new) in recall.items()
        ],
    )
    scenes = demo["scenes"]
    caption = (
        "Macro recall in percent on scenes that neither the backbone nor the heads have seen. "
        f"Seed {demo['seed']}; heads trained on {scenes['train']} labelled scenes, chosen on {scenes['validation']} "
        f"others, scored on {scenes['test']} more. One run of one seed: docs/demo.md has several and their spread."
    )
    return section(
        "Before and after alignment",
        paragraph(
            "Heads learn from frozen features which classes are in every patch (local) or in the whole picture "
            "(global)."
        ),
        figures(
            figure(dots(rows, WHEN, "macro recall before and after alignment"), caption, legend(WHEN)),
            f"<figure>{told}</figure>",
        ),
    )


def _pictures(demo: dict[str, Any]) -> str:
    if not demo["pictures"]:
        return ""
    from locfast.data.scenes import SceneSource
    from locfast.report.scenes import scene_map

    rows, columns = demo["grid"]
    source = SceneSource(1 + max(p["scene"] for p in demo["pictures"]), seed=demo["scenes"]["stream"])
    blocks = []
    for picture in demo["pictures"]:
        number, truth = picture["scene"], picture["truth"]
        uri = data_uri(source.read(number).image, lossless=True)
        cells = [
            f'<div><svg viewBox="0 0 {columns} {rows}" role="img" aria-label="scene {number}" '
            f'xmlns="http://www.w3.org/2000/svg"><image class="pixels" href="{uri}" width="{columns}" '
            f'height="{rows}"/></svg>scene {number}</div>'
        ]
        for when in WHEN:
            wrong = sum(a not in t for a, t in zip(picture[when], truth, strict=True))
            drawn = scene_map(picture[when], (rows, columns), truth, f"scene {number}, {when}")
            cells.append(f"<div>{drawn}{when}: {wrong} wrong</div>")
        blocks.append(f'<figure><div class="maps">{"".join(cells)}</div></figure>')
    return section(
        "What every patch is taken for",
        paragraph(
            "The likeliest class of every patch by the local probe, from its embedding alone: a square in the body's "
            "colour with the core's inside, black for bare ground. A cross marks a class that is not there."
        ),
        f'<div class="pictures small">{"".join(blocks)}</div>',
    )
