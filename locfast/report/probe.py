"""The report of one probe: what each head finds, of which classes and sizes, and how its training went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from locfast.eval.probing import analysis
from locfast.eval.probing.bootstrap import Interval, Resamples, measured, resampled
from locfast.eval.probing.comparable import Probed
from locfast.eval.probing.results import ProbeResult, read_result
from locfast.eval.probing.table import span
from locfast.report.charts import Value, dots, legend, lines, percent
from locfast.report.gallery import Shown, gallery
from locfast.report.page import facts, figure, figures, fold, page, paragraph, section, table, tiles

BY_COUNTS = "95 % intervals by bootstrap over images"
"""And over seeds, where there are several."""


def probe_page(folder: Path) -> str:
    """Everything that a folder of `python -m locfast.probe` tells."""
    probe = Probed("", folder, read_result(folder))
    result = probe.result
    draws = Resamples.of(result.images["validation"])
    scored = {key: analysis.scores(probe.counts(key), draws)[0] for key in _keys(result)}
    local = analysis.headline(list(scored))
    sections = [
        _scores(result, scored),
        _classes(probe, local, draws) if local else "",
        _sizes(probe, local, draws) if local else "",
        _training(result),
        gallery(_pictures(probe, local), result.classes, local) if local else "",
        how_measured(result.images, result.settings, {result.model: result.machine}, {result.model: result.seconds}),
    ]
    return page(result.model, f"Patch probe · {result.data}", _lede(result, scored), sections)


def head_name(key: str) -> str:
    """local/transformer/prefix as "local, transformer, prefix tokens alone"."""
    said = {"prefix": "prefix tokens alone", "anonymous": "tokens without their places"}
    return ", ".join(said.get(part, part) for part in key.split("/"))


def how_measured(
    images: Mapping[str, int],
    settings: Mapping[str, Any],
    machines: Mapping[str, Mapping[str, str]],
    seconds: Mapping[str, Mapping[str, float]],
) -> str:
    """A section with the protocol, the machine and where the time went."""
    words = paragraph(PROTOCOLS[settings["protocol"]], "note") if settings.get("protocol") in PROTOCOLS else ""
    about = [("images", ", ".join(f"{count} {name}" for name, count in images.items()))]
    about += [(name, str(value)) for name, value in settings.items() if name != "model"]
    parts = list(dict.fromkeys(part for one in seconds.values() for part in one))
    rows = [[short_of, *(f"{one[p]:.1f}" if p in one else "-" for p in parts)] for short_of, one in seconds.items()]
    where = table("Where the time went, seconds", ["backbone", *parts], rows)
    on = facts((name, ", ".join(f"{k} {v}" for k, v in one.items())) for name, one in machines.items())
    return section("How it was measured", words, facts(about), fold("Machine and time", on + where))


PROTOCOLS = {
    "paper": "By the paper's protocol: the epoch that is reported is the best one on the split that is reported, which "
    "flatters every figure.",
}
"""What a reader must know of a protocol."""


def _keys(result: ProbeResult) -> list[str]:
    return list(result.keys())


def _lede(result: ProbeResult, scored: Mapping[str, dict[str, Interval]]) -> str:
    shown = []
    for task in ("local", "global"):
        key = analysis.headline(list(scored), task)
        if key:
            one = scored[key]["recall"]
            text = f"{key.split('/')[1]} head; 95 % interval {percent(one['low'])} to {percent(one['high'])}"
            shown.append((f"{task} macro recall, %", percent(one["value"]), text))
    cap = f"soft cap {result.softcap:g}" if result.softcap is not None else "no soft cap"
    size = f"{result.image_size[0]} x {result.image_size[1]} pixels in {result.grid[0]} x {result.grid[1]} patches"
    return paragraph(f"{size}, {cap}.", "lede") + tiles(shown)


def _scores(result: ProbeResult, scored: Mapping[str, dict[str, Interval]]) -> str:
    rows, charts = [], []
    for key, one in scored.items():
        heads = result.of(key)
        ap = [head.validation["ap"] for head in heads if head.validation.get("ap") is not None]
        told = [*(span(one[name]) for name in analysis.SCORES), percent(mean(ap)) if ap else "-"]
        rows.append([head_name(key), *told, str(len(heads)), ", ".join(str(head.best_epoch) for head in heads)])
    for task in ("local", "global"):
        drawn = [(head_name(key), {1: as_value(one["recall"])}) for key, one in scored.items() if key.startswith(task)]
        caption = f"Macro recall of the {task} heads in percent, with {BY_COUNTS}."
        charts.append(figure(dots(drawn, [""], f"{task} macro recall"), caption))
    shown = table(
        f"Macro averages on the validation split in percent, with {BY_COUNTS} and, where several, seeds",
        ["head", *analysis.SCORES, "AP", "seeds", "epoch kept"],
        rows,
    )
    return section("Scores", figures(*charts), shown)


def as_value(one: Mapping[str, Any], note: str = "") -> Value:
    """An interval of an analysis for a chart; bounds that could not be made are none."""
    low, high = (None if (e := one.get(end)) is None or math.isnan(e) else e for end in ("low", "high"))
    return Value(one["value"], low, high, note)


def _classes(probe: Probed, key: str, draws: Resamples) -> str:
    """The classes found best and worst, of things and of stuff where the data tell them apart."""
    runs, result = probe.counts(key), probe.result
    exact, drawn = measured(runs)["recall"], resampled(runs, draws)["recall"]
    recall: list[Interval | None] = []
    for k, one in enumerate(exact):
        low, high = np.nanpercentile(drawn[:, k], (2.5, 97.5)) if not np.isnan(one) else (0, 0)
        recall.append(None if np.isnan(one) else {"value": float(one), "low": float(low), "high": float(high)})
    charts = []
    for name, ids in analysis.kinds(len(result.classes), result.things, result.unlabeled).items():
        ranked = analysis.most_improved(recall, ids, top=len(ids))
        few = ranked if len(ranked) <= 12 else [*ranked[:6], *ranked[-6:]]
        rows = [(result.classes[k], {1: as_value(recall[k] or {})}) for k in few]
        which = "" if name == "all" else f" of {name}"
        caption = f"Recall{which} by class in percent" + ("." if few is ranked else ": the six best and the six worst.")
        told = table(f"Recall{which}, %", ["class", "recall"], [[result.classes[k], span(recall[k])] for k in ranked])
        charts.append(figure(dots(rows, [""], f"recall{which} by class"), caption, "", told))
    return section(f"By class, {head_name(key)} head", figures(*charts))


def _sizes(probe: Probed, key: str, draws: Resamples) -> str:
    runs, result = probe.counts(key), probe.result
    edges = analysis.size_edges(probe.shares(), runs[0].there)
    bins = analysis.size_bins(probe.shares(), runs[0].there, edges, result.unlabeled)
    found = [one and one[0] for one in analysis.size_recall(runs, bins, len(edges) - 1, draws)]
    return section(f"By object size, {head_name(key)} head", figures(size_figure({"recall": found}, edges.tolist())))


def size_figure(
    models: Mapping[str, Sequence[Mapping[str, Any] | None]], edges: Sequence[float], title: str = ""
) -> str:
    """Recall of each model in bins of the share of the image that an object holds (figure 8).

    Bins of equal width stand at their places; others, of as many objects each, in a row.
    """
    even = max(np.diff(edges)) - min(np.diff(edges)) < 1e-6
    names = [f"{100 * a:.3g} to {100 * b:.3g} %" for a, b in pairwise(edges)]
    curves: dict[str, list[tuple[float, Value]]] = {}
    for model, bins in models.items():
        for i, one in enumerate(bins):
            if one is not None:
                x = 50 * (edges[i] + edges[i + 1]) if even else i + 1.0
                note = f"objects of {names[i]} of the image, {one['objects']} of {one['classes']} classes"
                curves.setdefault(model, []).append((x, as_value(one, note)))
    rows = []
    for i, name in enumerate(names):
        here = [bins[i] for bins in models.values()]
        objects = next((one["objects"] for one in here if one), 0)
        rows.append([name, str(objects), *map(span, here)])
    ticks = [0, 20, 40, 60, 80, 100] if even else list(range(1, len(names) + 1))
    where = "share of the image, %" if even else "bin, from small to large"
    chart = lines(curves, where, "recall, %", scale=100, x_ticks=ticks, markers=True)
    caption = (
        "Macro recall by the share of the image that an object holds, over the classes that have positives in a bin, "
        f"with {BY_COUNTS}. An object is all of a class in one image. "
        + ("Bins of equal width." if even else "Bins with about as many objects in each.")
    )
    told = table("Recall by object size, %" + title, ["share of the image", "objects", *models], rows)
    return figure(chart, caption, legend(list(models)), told)


def _training(result: ProbeResult) -> str:
    """Loss and selection score of every head, of its first seed."""
    firsts = {key: result.of(key)[0] for key in _keys(result) if key.count("/") == 1}
    charts = []
    for name, y_label, scale in (("loss", "training loss", 1.0), ("selection", "selection recall, %", 100.0)):
        curves = {
            head_name(key): [
                (float(i), Value(e[name], note=f"epoch {i}"))
                for i, e in enumerate(head.epochs, 1)
                if e.get(name) is not None
            ]
            for key, head in firsts.items()
        }
        curves = {key: curve for key, curve in curves.items() if curve}
        seed = next(iter(firsts.values())).seed if firsts else 0
        caption = f"{y_label.removesuffix(', %').capitalize()} by epoch, seed {seed}."
        charts.append(figure(lines(curves, "epoch", y_label, scale=scale), caption, legend(list(curves))))
    return section("How the heads trained", figures(*charts))


def _pictures(probe: Probed, key: str | None) -> list[Shown]:
    head, result = str(key).split("/")[1], probe.result
    found = []
    for one in result.pictures:
        answers = one.likeliest.get(head, one.likeliest.get(str(key)))
        if answers is not None:
            name = "told"
            found.append(
                Shown(one.name, probe.folder / one.image, {name: result.grid}, {name: one.truth}, {name: answers})
            )
    return found
