"""The report of an analysis: attention distance, spectra and attention maps (LUT, figures 1, 4, A and B)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from locfast.report.charts import SERIES, Value, legend, lines
from locfast.report.heat import heat_maps, queried
from locfast.report.page import facts, figure, figures, fold, page, paragraph, section, table

Found = dict[str, Any]


def analysis_page(folder: Path) -> str:
    """Everything that a folder of `python -m locfast.analyze` tells."""
    told = json.loads((folder / "analyze.json").read_text(encoding="utf-8"))
    names, found = list(told["models"]), told["found"]
    sections = [
        _distance(found["models"], names),
        _spectrum(found, names),
        _maps(told, names, folder),
        _how(told),
    ]
    title = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    lede = paragraph(f"Every block of {len(names)} backbone{'s' * (len(names) > 1)}, on {told['data']['read']} images.")
    return page(title, "Attention and features by layer", lede, sections)


def _distance(models: Mapping[str, Found], names: list[str]) -> str:
    """Figure 4a."""
    found = {name: models[name]["distance"] for name in names}
    curves = {
        name: [
            (i + 1, Value(mean, min(heads), max(heads), f"block {i + 1}, heads {min(heads):.3f} to {max(heads):.3f}"))
            for i, (mean, heads) in enumerate(zip(one["by_layer"], one["by_head"], strict=True))
        ]
        for name, one in found.items()
    }
    prefix = {
        name: [(i + 1, Value(sum(heads) / len(heads))) for i, heads in enumerate(one["to_prefix_by_head"])]
        for name, one in found.items()
    }
    rows = [
        [str(i + 1), *(f"{mean:.4f}" if mean is not None else "" for mean in means)]
        for i, means in enumerate(zip_longest(*(one["by_layer"] for one in found.values())))
    ]
    heads = [
        [name, str(i + 1), ", ".join(f"{head:.3f}" for head in sorted(row))]
        for name, one in found.items()
        for i, row in enumerate(one["by_head"])
    ]
    about = paragraph(
        "How far from a patch lies what it looks at: the distance between centres of patches in an image of side 1, "
        "weighted by attention and averaged over queries and images (LUT, equation 4, there summed over queries). "
        "Attention to prefix tokens has no place and counts as no distance."
    )
    drawn = lines(curves, "block", "distance", markers=True, may_be_log=False)
    caption = (
        "Average attention distance by block. Marks are the mean of the heads, bars go from the least head to the "
    )
    shares = lines(prefix, "block", "share", markers=True, may_be_log=False)
    return section(
        "Average attention distance",
        about,
        figures(
            figure(drawn, caption + "largest.", legend(names), table("Mean of heads", ["block", *names], rows)),
            figure(shares, "Share of attention that patches give to prefix tokens (CLS, registers).", legend(names)),
        ),
        fold("Every head", table("Average attention distance, heads in rising order", ["", "block", "heads"], heads)),
    )


def _spectrum(found: Found, names: list[str]) -> str:
    """Figure 4b."""
    spectra = {name: found["models"][name]["spectrum"] for name in names}
    ranks = {
        name: [
            (i + 1, Value(one["effective_rank"], note=f"behind {layer}"))
            for i, (layer, one) in enumerate(layers.items())
        ]
        for name, layers in spectra.items()
    }
    layers = list(dict.fromkeys(layer for one in spectra.values() for layer in one))
    rows = [
        [layer, *(f"{one[layer]['effective_rank']:.2f}" if layer in one else "" for one in spectra.values())]
        for layer in layers
    ]
    charts = [
        figure(
            lines(ranks, "layer", "effective rank", markers=True, may_be_log=False),
            "exp of the entropy of the singular values over their sum. A final norm is the last layer.",
            legend(names),
            table("Effective rank", ["behind", *names], rows),
        )
    ]
    for one in found["differences"]:
        shown = _spread_out(list(one["log10"]))
        curves = {layer: [(i + 1, Value(v)) for i, v in enumerate(one["log10"][layer])] for layer in shown}
        caption = (
            f"log10 of the singular values of {one['model']} less those of {one['against']}, by rank: above zero where "
            f"{one['model']} spreads wider."
        )
        charts.append(figure(lines(curves, "rank", "difference", may_be_log=False), caption, legend(shown)))
    for layer in dict.fromkeys([_last_block(one) for one in spectra.values()] + ["final norm"]):
        curves = {
            name: [(i + 1, Value(v)) for i, v in enumerate(np.log10(one[layer]["singular_values"]).tolist())]
            for name, one in spectra.items()
            if layer in one
        }
        caption = f"Singular values behind {layer}, log10, by rank."
        charts.append(figure(lines(curves, "rank", "log10", may_be_log=False), caption, legend(list(curves))))
    about = paragraph(
        "How many directions the images' features use: singular values of the covariance, over images, of the mean "
        "patch token. More of them, and larger, mean a feature space that is used more fully (LUT, figure 4b)."
    )
    return section("Singular values of features", about, figures(*charts))


def _last_block(spectra: Mapping[str, Any]) -> str:
    return [layer for layer in spectra if layer != "final norm"][-1]


def _spread_out(layers: list[str]) -> list[str]:
    """At most as many as there are looks, evenly spread, the last ones of them."""
    step = -(-len(layers) // SERIES)
    return layers[::-1][::step][::-1]


def _maps(told: Found, names: list[str], folder: Path) -> str:
    """Figures 1, A and B."""
    if not told["pictures"] or not (folder / "maps.npz").is_file():
        return ""
    queries = told["settings"]["query"]
    grid = told["models"][names[0]]["grid"]
    with np.load(folder / "maps.npz") as stored:
        maps = {name: stored[f"model{i}"] for i, name in enumerate(names)}
    blocks = []
    for number, picture in enumerate(told["pictures"]):
        file = folder / "pictures" / f"{number:02}.png"
        cells = [
            queried(file, query, grid, f"picture-{number}-{i}", f"{picture}, query {query[0]},{query[1]}")
            + "".join(
                heat_maps(one[number, i], name, f"{picture}, query {query[0]},{query[1]}: {name}")
                for name, one in maps.items()
            )
            for i, query in enumerate(queries)
        ]
        blocks += [f'<figure><div class="maps">{cell}</div></figure>' for cell in cells]
    about = paragraph(
        "What a query patch (ringed) looks at in the last block: one map for every head, row by row, each scaled "
        "to its own largest patch. Attention to prefix tokens is left out."
    )
    return section("Attention maps of the last block", about, f'<div class="pictures small">{"".join(blocks)}</div>')


def _how(told: Found) -> str:
    settings = told["settings"]
    pairs = [
        ("images", f"{told['data']['read']} of {told['data']['images']} in {told['data']['source']}"),
        ("seed", str(settings["seed"])),
        ("device", f"{settings['device']}, {settings['precision']}"),
        *(
            (name, f"{one['backbone']}, {one['image_size'][0]} px, {_cap(one['softcap'])}")
            for name, one in told["models"].items()
        ),
        *((name, version) for name, version in told["versions"].items() if name in ("locfast", "torch", "timm")),
    ]
    return section("How it was measured", facts(pairs))


def _cap(softcap: float | None) -> str:
    return "no soft cap" if softcap is None else f"soft cap {softcap:g}"
