"""Several backbones by one probe, beside each other: DIR/compare.json with every figure, and a table."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from locfast.errors import UserError
from locfast.eval.probing import analysis
from locfast.eval.probing.bootstrap import RESAMPLES, Resamples, interval
from locfast.eval.probing.comparable import Probed, check_alike, open_probes, pick_baseline, shared_seeds

SCHEMA = 1
FILE = "compare.json"


def compare(folders: Sequence[Path], out: Path, baseline: str | None = None, resamples: int = RESAMPLES) -> Path:
    """Compare the probes in `folders` and write DIR/compare.json, with the pictures it names. Gives that file.

    baseline: which one the others are set against (name, model or folder); the first unless said. Raises UserError
    where a folder holds no probe, or where two were probed on other data, classes or by another protocol.
    """
    probes = open_probes(folders)
    base = pick_baseline(probes, baseline)
    if any((out / other).is_file() for other in ("probe.json", "config.yaml")):
        raise UserError(f"--out {out}: a probe or a run is there, whose report would be lost; give another folder.")
    probes = [base, *(one for one in probes if one is not base)]
    notes = [note for other in probes[1:] for note in check_alike(base, other)]
    draws = Resamples.of(base.result.images["validation"], resamples)
    found: dict[str, Any] = {"schema": SCHEMA, "baseline": base.name, "resamples": resamples}
    found |= {"models": [_about(one) for one in probes]}
    found |= {name: getattr(base.result, name) for name in ("data", "layout", "classes", "things", "unlabeled")}
    found |= {"images": base.result.images, "settings": base.result.settings}
    found["heads"] = {key: _head(key, probes, draws, notes) for key in _keys(probes)}
    found["notes"] = list(dict.fromkeys(notes))
    local, whole = (analysis.headline(_keys([base]), task) for task in ("local", "global"))
    found["headline"] = {"local": local, "global": whole}
    with_it = [one for one in probes if local and one.result.of(local)]
    found["by_class"] = _by_class(local, with_it, draws) if local else {}
    ways = ("width", "quantiles") if local else ()
    found["by_size"] = {way: _by_size(str(local), with_it, draws, way == "quantiles") for way in ways}
    found["relative_locality"] = _trend(found, local, whole)
    found["interventions"] = {one.name: analysis.interventions(one.result) for one in probes}
    out.mkdir(parents=True, exist_ok=True)
    found["pictures"] = _pictures(probes, local, out) if local else []
    aside = out / f".{FILE}"
    aside.write_text(json.dumps(_plain(found), indent=1) + "\n", encoding="utf-8")
    os.replace(aside, out / FILE)
    return out / FILE


def read_comparison(folder: Path) -> dict[str, Any]:
    """What `compare` wrote. Raises UserError where `folder` holds no comparison."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError("of another version of locfast")
        return found
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {FILE}: give a folder that `--compare ... --out` wrote.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE} is no comparison that this locfast reads ({error}); compare anew.") from None


def _keys(probes: Sequence[Probed]) -> list[str]:
    return list(dict.fromkeys(head.key for one in probes for head in one.result.heads))


def _about(one: Probed) -> dict[str, Any]:
    result = one.result
    about = {name: getattr(result, name) for name in ("model", "softcap", "grid", "image_size", "machine", "seconds")}
    return {"name": one.name, "folder": str(one.folder), "aligned": one.aligned} | about


def _head(key: str, probes: Sequence[Probed], draws: Resamples, notes: list[str]) -> dict[str, Any]:
    """A head of all probes that have it: scores with intervals, and differences of the others from the first."""
    have = [one for one in probes if one.result.of(key)]
    seeds = shared_seeds(have, key)
    if any(len(one.result.of(key)) > len(seeds) for one in have):
        notes.append(f"{key}: only the seeds {' '.join(map(str, seeds))}, which all backbones have, are compared.")
    rows: dict[str, Any] = {}
    first: tuple[dict[str, Any], dict[str, np.ndarray]] | None = None
    for one in have:
        values, drawn = analysis.scores(one.counts(key, seeds), draws)
        by_seed = {head.seed: head.validation for head in one.result.of(key)}
        ap = [by_seed[seed]["ap"] for seed in seeds if by_seed[seed].get("ap") is not None]
        row: dict[str, Any] = {**values, "ap": {"value": mean(ap), "seeds": ap} if len(ap) == len(seeds) else None}
        if one is probes[0]:
            first = row, drawn
        elif first is not None:
            row["difference"] = {
                name: interval(values[name]["value"] - first[0][name]["value"], drawn[name] - first[1][name])
                for name in analysis.SCORES
            }
            if row["ap"] and first[0]["ap"]:
                each = [new - old for new, old in zip(ap, first[0]["ap"]["seeds"], strict=True)]
                row["difference"]["ap"] = {"value": mean(each), "seeds": each}
        rows[one.name] = row
    return {"seeds": seeds, "models": rows}


def _by_class(key: str, probes: Sequence[Probed], draws: Resamples) -> dict[str, Any]:
    """By model: gain in recall of every class against the first one, and the most improved of things and of stuff."""
    base, found = probes[0], {}
    groups = analysis.kinds(len(base.result.classes), base.result.things, base.result.unlabeled)
    seeds = shared_seeds(probes, key)
    for one in probes[1:]:
        gains = analysis.class_gains(base.counts(key, seeds), one.counts(key, seeds), draws)
        top = {name: analysis.most_improved(gains, ids) for name, ids in groups.items()}
        found[one.name] = {"gains": gains, "top": top}
    return found


def _by_size(key: str, probes: Sequence[Probed], draws: Resamples, quantiles: bool) -> dict[str, Any]:
    """Recall of every model in bins of object size, the bins those of the first one's label maps."""
    base, seeds = probes[0], shared_seeds(probes, key)
    edges = analysis.size_edges(
        base.shares(), base.counts(key, seeds[:1])[0].there, quantiles, unlabeled=base.result.unlabeled
    )
    rows: dict[str, list[Any]] = {}
    first: list[Any] = []
    for one in probes:
        runs = one.counts(key, seeds)
        bins = analysis.size_bins(base.shares(), runs[0].there, edges, base.result.unlabeled)
        found = analysis.size_recall(runs, bins, len(edges) - 1, draws)
        first = first or found
        rows[one.name] = [
            ours and ours[0] | ({} if one is base or not theirs else {"difference": _less(ours, theirs)})
            for ours, theirs in zip(found, first, strict=True)
        ]
    return {"edges": edges.tolist(), "models": rows}


def _less(ours: Any, theirs: Any) -> dict[str, float]:
    return interval(ours[0]["value"] - theirs[0]["value"], ours[1] - theirs[1])


def _trend(found: dict[str, Any], local: str | None, whole: str | None) -> dict[str, Any]:
    if local is None or whole is None:
        return {"absent": "it needs a local and a global head"}
    heads = [found["heads"][key]["models"] for key in (whole, local)]
    names = [one["name"] for one in found["models"] if all(one["name"] in rows for rows in heads)]
    points = {name: (heads[0][name]["recall"]["value"], heads[1][name]["recall"]["value"]) for name in names}
    plain = [one["name"] for one in found["models"] if one["name"] in points and not one["aligned"]]
    return {"points": points} | analysis.relative_locality(points, plain)


def _pictures(probes: Sequence[Probed], key: str, out: Path) -> list[dict[str, Any]]:
    """The pictures that all probes have, copied into DIR/pictures: a comparison stands without the probes' folders."""
    head, base = key.split("/")[1], probes[0]
    of = [{one.name: one for one in probe.result.pictures} for probe in probes]
    found: list[dict[str, Any]] = []
    for picture in base.result.pictures:
        file = base.folder / picture.image
        same = {probe.name: by[picture.name] for probe, by in zip(probes, of, strict=True) if picture.name in by}
        answers = {name: one.likeliest.get(head, one.likeliest.get(key)) for name, one in same.items()}
        if len(same) < len(probes) or None in answers.values() or not file.is_file():
            continue
        kept = out / "pictures" / f"{len(found):03d}{file.suffix}"
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, kept)
        truth = {name: one.truth for name, one in same.items()}
        about = {"name": picture.name, "image": str(kept.relative_to(out)), "head": key}
        found.append(about | {"truth": truth, "likeliest": answers})
    return found


def _plain(value: Any) -> Any:
    """NaN is no JSON: a figure that could not be made is null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and value != value else value
