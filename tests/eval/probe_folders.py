"""Folders as `python -m locfast.probe` leaves them, with numbers drawn by a seeded generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from locfast.eval.probing.results import Counts, HeadResult, Picture, ProbeResult, write_result

CLASSES = ["unlabeled", "cat", "dog", "cup", "sky", "grass", "<script>alert(1)</script>", "never there"]


def validation_scores(counts: Counts) -> tuple[dict[str, float], dict[str, list[float | None]]]:
    """Macro scores and scores by class, in plain loops: what a probe reports beside its counts."""
    by_class: dict[str, list[float | None]] = {"recall": [], "precision": [], "f1": [], "ap": []}
    for k in range(counts.there.shape[1]):
        hits, told, there = (int(part[:, k].sum()) for part in (counts.hits, counts.told, counts.there))
        values = (hits / there, hits / max(told, 1), 2 * hits / (told + there), hits / there) if there else [None] * 4
        for name, value in zip(by_class, values, strict=True):
            by_class[name].append(value)
    known = {name: [v for v in values if v is not None] for name, values in by_class.items()}
    return {name: sum(values) / len(values) for name, values in known.items()}, by_class


def draw_labels(images: int, classes: int, patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of pixels [M, K] and how many of `patches` patches hold a class [M, K]; the last class is nowhere."""
    generator = np.random.default_rng(5)
    raw = generator.gamma(0.4, size=(images, classes)) * (generator.random((images, classes)) < 0.5)
    raw[:, -1] = 0.0
    raw[:, 0] += 1e-3
    shares = raw / raw.sum(1, keepdims=True)
    return shares.astype(np.float32), np.minimum(np.ceil(shares * patches), patches).astype(np.int32)


def make_probe(
    folder: Path,
    model: str = "vit_small",
    skill: float = 0.5,
    *,
    images: int = 40,
    train: int = 400,
    grid: tuple[int, int] = (6, 6),
    size: tuple[int, int] = (96, 96),
    classes: list[str] = CLASSES,
    seeds: tuple[int, ...] = (0,),
    heads: tuple[str, ...] = ("transformer", "linear"),
    interventions: bool = True,
    softcap: float | None = None,
    pictures: int = 2,
    **changes: Any,
) -> Path:
    """Write a probe whose heads find a share `skill` of what is there, more of it in large objects. Gives `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shares, local = draw_labels(images, len(classes), grid[0] * grid[1])
    np.savez_compressed(folder / "shares.npz", shares=shares)
    made = []
    for task, there in (("local", local), ("global", (local > 0).astype(np.int32))):
        for head in heads:
            for intervention in ("none", "prefix", "anonymous") if interventions and task == "local" else ("none",):
                for seed in seeds:
                    lost = {"none": 0.0, "anonymous": 0.1, "prefix": 0.25}[intervention]
                    chance = np.clip(skill - lost - 0.08 * (head != "transformer") + 0.3 * shares, 0.02, 0.98)
                    generator = np.random.default_rng([seed, len(made) % 97])
                    hits = generator.binomial(there, chance).astype(np.int32)
                    counts = Counts(hits, hits + generator.binomial(2, 0.2, hits.shape).astype(np.int32), there)
                    name = f"counts/{task}-{head}-{intervention}-{seed}.npz"
                    counts.write(folder / name)
                    scores, by_class = validation_scores(counts)
                    epochs = [{"loss": 0.7 / (e + 1), "selection": scores["recall"] - 0.5**e / 4} for e in range(1, 6)]
                    made.append(HeadResult(task, head, intervention, seed, epochs, 5, scores, scores, by_class, name))
    result = {
        "model": model,
        "softcap": softcap,
        "data": "camvid",
        "layout": "folders",
        "classes": classes,
        "things": [1, 2, 3, 6],
        "unlabeled": 0,
        "grid": grid,
        "image_size": size,
        "images": {"train": train, "selection": 50, "validation": images},
        "settings": {"model": model, "protocol": "held-out", "labels": "union", "epochs": 5, "lr": 1e-3},
        "machine": {"device": "NVIDIA H100", "torch": "2.11.0"},
        "seconds": {"features": 61.5, "heads": 40.25, "scores": 1.5, "all": 103.25},
        "heads": made,
        "pictures": [_picture(folder, i, grid, size, len(classes), heads, skill) for i in range(pictures)],
        "shares": "shares.npz",
    }
    write_result(ProbeResult(**(result | changes)), folder)
    return folder


def _picture(folder: Path, number: int, grid: Any, size: Any, classes: int, heads: Any, skill: float) -> Picture:
    """A photograph-like picture in big blocks, its patches' classes, and answers of which a share `skill` is right."""
    file = Path("pictures") / f"{number}.{'png' if number % 2 else 'jpg'}"
    (folder / file).parent.mkdir(exist_ok=True)
    scene = np.random.default_rng(number)
    blocks = scene.integers(1, classes - 1, (2, 3))
    ids = np.repeat(np.repeat(blocks, -(-grid[0] // 2), 0)[: grid[0]], -(-grid[1] // 3), 1)[:, : grid[1]]
    colors = scene.integers(40, 220, (classes, 3))
    pixels = np.kron(colors[ids], np.ones((size[0] // grid[0], size[1] // grid[1], 1)))
    noisy = np.clip(pixels + scene.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(folder / file)
    truth = [[int(k)] for k in ids.ravel()]
    for patch in range(0, len(truth), 7):
        truth[patch] = sorted({*truth[patch], 1 + patch % 5})
    answers = np.random.default_rng([number, int(1000 * skill)])
    told, likeliest = {}, {}
    for head in heads:
        likeliest[head] = [int(t[0]) if answers.random() < skill else int(answers.integers(0, classes)) for t in truth]
        told[head] = [[one] if answers.random() < 0.9 else [] for one in likeliest[head]]
    return Picture(f"image <{number}>", str(file), truth, told, likeliest)
