"""The report of a comparison: the paper's figures 3 and 6 to 9, for backbones of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from locfast.eval.probing import analysis
from locfast.eval.probing.compare import read_comparison
from locfast.eval.probing.table import MEASURES, span
from locfast.report.charts import dots, legend, percent, scatter, strip
from locfast.report.gallery import Shown, gallery
from locfast.report.page import figure, figures, fold, page, paragraph, section, table, tiles
from locfast.report.probe import BY_COUNTS, as_value, head_name, how_measured, size_figure

Found = dict[str, Any]
UNFOLDED = 3
"""Backbones whose changes by class are all in sight; of more, each is folded."""


def comparison_page(folder: Path) -> str:
    """Everything that a folder of `python -m locfast.probe --compare` tells."""
    found = read_comparison(folder)
    names = [one["name"] for one in found["models"]]
    local = found["headline"]["local"]
    sections = [
        _scores(found, names),
        *([_classes(found, local), _sizes(found, local)] if local else []),
        _trend(found, names),
        _interventions(found, names),
        gallery(_pictures(found, folder), found["classes"], local) if local else "",
        how_measured(
            found["images"],
            found["settings"],
            {one["name"]: one["machine"] for one in found["models"]},
            {one["name"]: one["seconds"] for one in found["models"]},
        ),
    ]
    others = names[1:]
    title = f"{others[0]} against {names[0]}" if len(others) == 1 else f"{len(names)} backbones"
    return page(title, f"Patch probe, compared · {found['data']}", _lede(found, names), sections)


def _lede(found: Found, names: list[str]) -> str:
    """How far each backbone lies from the first, in the heads that the paper judges by."""
    shown = []
    for name in names[1:]:
        for task in ("local", "global"):
            rows = found["heads"].get(found["headline"][task], {"models": {}})["models"]
            if name in rows:
                change, ours, theirs = rows[name]["difference"]["recall"], rows[name], rows[names[0]]
                about = (
                    f"{name} at {percent(ours['recall']['value'])} % against {percent(theirs['recall']['value'])} %; "
                    f"{_interval(change)}"
                )
                label = f"{task} recall, {found['headline'][task].split('/')[1]} head, points"
                shown.append((label, percent(change["value"], True), about))
    first = paragraph(f"Set against {names[0]}, on {found['images']['validation']} validation images.", "lede")
    return first + tiles(shown) + "".join(paragraph(note, "note") for note in found["notes"])


def _interval(change: Mapping[str, Any]) -> str:
    if change["low"] is None:
        return "no interval"
    holds = ", which holds zero" if change["low"] <= 0 <= change["high"] else ""
    return f"95 % interval {percent(change['low'], True)} to {percent(change['high'], True)}{holds}"


def _scores(found: Found, names: list[str]) -> str:
    charts = []
    for task in ("local", "global"):
        rows = [
            (head_name(key), {names.index(name): as_value(row["recall"]) for name, row in head["models"].items()})
            for key, head in found["heads"].items()
            if key.startswith(task) and key.count("/") == 1
        ]
        caption = f"Macro recall of the {task} heads in percent, with {BY_COUNTS}."
        charts.append(figure(dots(rows, names, f"{task} macro recall by head"), caption, legend(names)))
    gains = [
        (
            head_name(key),
            {
                names.index(n): as_value(row["difference"]["recall"])
                for n, row in head["models"].items()
                if "difference" in row
            },
        )
        for key, head in found["heads"].items()
        if key.count("/") == 1 and len(head["models"]) > 1
    ]
    caption = (
        f"Difference in macro recall from {names[0]}, in points. Intervals are of pairs: both backbones are scored on "
        "the same drawn images and seeds, so a difference can be certain where the two intervals above overlap."
    )
    charts.append(
        figure(dots(gains, names, "difference in recall by head", signed=True, zero=True), caption, legend(names, 1))
    )
    head = ["head", "backbone", *(part for m in MEASURES.values() for part in (m, "difference")), "precision"]
    rows_told = []
    for key, one in found["heads"].items():
        for name, row in one["models"].items():
            change = row.get("difference")
            cells = [part for m in MEASURES for part in (span(row[m]), span(change.get(m), True) if change else "")]
            rows_told.append([head_name(key), name, *cells, span(row["precision"])])
    told = table(
        f"Macro averages in percent, differences from {names[0]} in points; in brackets {BY_COUNTS} and, where "
        f"several, seeds ({found['resamples']} draws). AP has no interval: it does not follow from counts.",
        head,
        rows_told,
        names=2,
    )
    return section("Scores", figures(*charts), told)


def _classes(found: Found, key: str) -> str:
    """Figure 7, for each backbone that is set against the first."""
    parts = []
    for name, one in found["by_class"].items():
        gains, classes = one["gains"], found["classes"]
        ranked = analysis.most_improved(gains, top=len(gains))
        every = [(classes[k], as_value(gains[k])) for k in ranked]
        up = sum(v.value > 0 for _, v in every)
        sure = sum(v.low is not None and v.low > 0 for _, v in every)
        caption = (
            f"{name}: change in recall of every class, in points, the most improved first. {up} of {len(every)} "
            f"classes gain, {sure} of them with an interval above zero."
        )
        told = table(
            "Change in recall by class, points",
            ["class", "change"],
            [[classes[k], span(gains[k], True)] for k in ranked],
        )
        charts = [figure(strip(every, "change in recall by class"), caption, "", told)]
        for kind, ids in one["top"].items():
            rows = [(classes[k], {1: as_value(gains[k])}) for k in ids]
            which = "classes" if kind == "all" else f"{kind} classes"
            drawn = dots(rows, [""], f"most improved {which}", signed=True, zero=True)
            charts.append(figure(drawn, f"{name}: the {len(rows)} most improved {which}, change in recall in points."))
        heading = f"<h3>{escape(name)}</h3>" if len(found["by_class"]) > 1 else ""
        parts.append(fold(name, figures(*charts)) if len(found["by_class"]) > UNFOLDED else heading + figures(*charts))
    return section(f"By class, {head_name(key)} head", *parts) if parts else ""


def _sizes(found: Found, key: str) -> str:
    charts = [
        size_figure(sizes["models"], sizes["edges"], "" if way == "width" else ", as many objects in each bin")
        for way, sizes in found["by_size"].items()
    ]
    edges, base = found["by_size"]["width"]["edges"], found["baseline"]
    order = [one["name"] for one in found["models"]]
    models = {name: bins for name, bins in found["by_size"]["width"]["models"].items() if name != base}
    rows, told = [], []
    for i, (low, high) in enumerate(pairwise(edges)):
        changes = {name: bins[i] and bins[i].get("difference") for name, bins in models.items()}
        size = f"{100 * low:.3g} to {100 * high:.3g} %"
        told.append([size, *(span(one, True) for one in changes.values())])
        known = {order.index(name): as_value(one) for name, one in changes.items() if one}
        if known:
            rows.append((size + " of the image", known))
    drawn = dots(rows, order, "difference in recall by object size", signed=True, zero=True)
    numbers = table(f"Difference in recall from {base} by object size, points", ["share of the image", *models], told)
    caption = f"Difference in recall from {base} by object size, in points, with intervals of pairs."
    charts.insert(1, figure(drawn, caption, legend(order, 1), numbers))
    return section(f"By object size, {head_name(key)} head", figures(*charts))


def _trend(found: Found, names: list[str]) -> str:
    """Figure 9, left."""
    trend = found["relative_locality"]
    about = paragraph(
        "Backbones with more global recall tend to have more local recall, too. One above the line through those that "
        "were not aligned knows more of what is where than its global recall lets expect; its distance from the line "
        "is its relative locality."
    )
    if "absent" in trend:
        missing = paragraph(f"There is no line: {trend['absent']}.", "quiet")
        return section("Relative locality", about, missing)
    aligned = {one["name"]: one["aligned"] for one in found["models"]}
    points, told = [], []
    for name in (n for n in names if n in trend["points"]):
        x, y = trend["points"][name]
        residual = trend["residuals"][name]
        kind = "aligned" if aligned[name] else "not aligned"
        points.append((name, x, y, aligned[name], f"; {kind}, relative locality {percent(residual, True)} points"))
        told.append([f"{len(points)}. {name} ({kind})", percent(x), percent(y), percent(residual, True)])
    drawn = scatter(points, (trend["slope"], trend["intercept"]), "global recall, %", "local recall, %")
    local, whole = found["headline"]["local"], found["headline"]["global"]
    caption = (
        f"Macro recall of the {head_name(local)} and {head_name(whole)} heads. "
        f"The line, by least squares, is of the {len(trend['trend'])} backbones without alignment (hollow)."
    )
    heads = ["backbone", "global, %", "local, %", "relative locality, points"]
    side = f"<figure>{table('Relative locality', heads, told)}</figure>"
    return section("Relative locality", about, figures(figure(drawn, caption), side))


def _interventions(found: Found, names: list[str]) -> str:
    """Figure 9, right."""
    keys: dict[str, dict[str, str]] = {}
    for one in found["interventions"].values():
        for head, by in one.items():
            keys.setdefault(head, {}).update(by)
    charts = []
    for head, by in keys.items():
        rows = []
        for what, said in (("none", "as it is"), ("anonymous", "without places"), ("prefix", "prefix tokens alone")):
            models = found["heads"].get(by.get(what, ""), {"models": {}})["models"]
            if models:
                rows.append((said, {names.index(n): as_value(row["recall"]) for n, row in models.items()}))
        caption = f"Macro recall of the {head_name(head)} head in percent, by what it may see of the tokens."
        charts.append(figure(dots(rows, names, f"recall of {head} under interventions"), caption, legend(names)))
    if not charts:
        return ""
    about = paragraph(
        "Do patches tell of their own place? Heads that see the prefix tokens (or the mean) alone, or tokens without "
        "their places, must do worse if so."
    )
    return section("Interventions", about, figures(*charts))


def _pictures(found: Found, folder: Path) -> list[Shown]:
    grids = {one["name"]: tuple(one["grid"]) for one in found["models"]}
    return [
        Shown(one["name"], folder / one["image"], grids, one["truth"], one["likeliest"]) for one in found["pictures"]
    ]
