"""`python -m locfast.report RUN`: write RUN/report.html, one file that loads nothing."""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
from html import escape
from pathlib import Path
from typing import Any

from locfast.cli import command
from locfast.errors import UserError

STYLE = """
:root { color-scheme: light; font: 16px/1.55 system-ui, sans-serif; color: #1d2733; background: #f6f8fa }
body { max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.4rem }
p { max-width: 46rem } .muted { color: #6b7785 }
section { background: #fff; border: 1px solid #e3e8ee; border-radius: 10px; padding: 1rem 1.25rem; overflow-x: auto }
svg.chart { max-width: 100%; height: auto } svg text { font: 13px system-ui, sans-serif }
.scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1.25rem }
.scene { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; text-align: center; font-size: .8rem }
.scene img, .scene svg { width: 100%; height: auto; display: block; border-radius: 6px }
.scene img { image-rendering: pixelated }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .2rem .8rem .2rem 0; text-align: left }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin: 0 .3rem 0 .8rem }
"""


def write_report(run: Path) -> Path:
    """Write RUN/report.html from config.yaml, metrics.jsonl and, where there is one, probe.json.

    Raises UserError when `run` is no run folder.
    """
    from locfast.engine.run_folder import RunFolder

    folder = RunFolder(run)
    if not folder.is_run():
        raise UserError(
            f"A report of {run} was asked for, but it is no run folder of locfast (no config.yaml that locfast wrote). "
            "Give the folder that `python -m locfast.train` named at its end, for example runs/maskembed-demo."
        )
    config = folder.config.read_text(encoding="utf-8")
    parts = [_loss(folder.read_metrics())]
    probe_file = run / "probe.json"
    if probe_file.is_file():
        probed = json.loads(probe_file.read_text(encoding="utf-8"))
        parts = [_bars(probed), *parts, _pictures(probed)]
    parts.append(f"<h2>Settings</h2><section><pre>{escape(config)}</pre></section>")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(run.name)}</h1>{''.join(parts)}</body></html>\n"
    )
    aside = run / ".report.html"
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, run / "report.html")
    return run / "report.html"


def _loss(metrics: list[dict[str, Any]]) -> str:
    from locfast.eval.svg import line_chart

    names = {"loss": "training", "val/loss": "held out", "loss/all_visible": "all patches visible"}
    curves = {
        shown: [(float(line["step"]), float(line[name])) for line in metrics if name in line]
        for name, shown in names.items()
    }
    chart = line_chart({name: curve for name, curve in curves.items() if curve}, "step", "loss")
    return f"<h2>Loss</h2><section>{chart or 'No step was logged yet.'}</section>"


def _bars(probed: dict[str, Any]) -> str:
    from locfast.eval.svg import AFTER, BEFORE, bar_chart

    order = [f"{task}/{kind}" for task in ("local", "global") for kind in ("transformer", "linear")]
    rows = [
        (name.replace("/", ", ") + " head", probed["before"][name]["recall"], probed["after"][name]["recall"])
        for name in order
        if name in probed["before"]
    ]
    scenes = probed["scenes"]
    return (
        "<p>Heads learn from frozen features which classes are in every patch (local) or in the whole picture "
        "(global). Macro recall on scenes that neither the backbone nor the heads have seen, in percent.</p>"
        f'<section><span class="key" style="background:{BEFORE}"></span>before '
        f'<span class="key" style="background:{AFTER}"></span>after alignment<br>{bar_chart(rows)}</section>'
        f'<p class="muted">Seed {probed["seed"]}; heads trained on {scenes["train"]} labelled scenes, chosen on '
        f"{scenes['validation']} others, scored on {scenes['test']} more. One run of one seed: see docs/demo.md for "
        "several seeds and their spread.</p>"
    )


def _pictures(probed: dict[str, Any]) -> str:
    from locfast.data.scenes import SceneSource
    from locfast.eval.svg import patch_map

    if not probed["pictures"]:
        return ""
    grid = tuple(probed["grid"])
    source = SceneSource(1 + max(p["scene"] for p in probed["pictures"]), seed=probed["scenes"]["stream"])
    blocks = []
    for picture in probed["pictures"]:
        cells = [f'<div><img alt="scene" src="{_png(source.read(picture["scene"]).image)}">scene</div>']
        for name in ("before", "after"):
            wrong = sum(a not in t for a, t in zip(picture[name], picture["truth"], strict=True))
            cells.append(f"<div>{patch_map(picture[name], grid, picture['truth'])}{name}: {wrong} wrong</div>")
        blocks.append(f'<div class="scene">{"".join(cells)}</div>')
    return (
        "<h2>What every patch is taken for</h2><p>The likeliest class of every patch by the local probe, from its "
        "embedding alone: a square in the body's colour with the core's inside, black for bare ground. A cross marks a "
        "class that is not there."
        f'</p><section class="scenes">{"".join(blocks)}</section>'
    )


def _png(image: bytes) -> str:
    """An encoded image as a PNG data URI."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(image)).save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m locfast.report", description="Write RUN/report.html anew.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, e.g. runs/maskembed-demo")
    print(write_report(parser.parse_args().run))


if __name__ == "__main__":
    main()
