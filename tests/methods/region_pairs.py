"""Images with captions and regions for CLOC, and its losses as the equations have them: loops, one at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from locfast.config.cloc import ClocConfig
from locfast.data.spec import Geometry, Record, Region
from locfast.methods.cloc import Cloc, Draw

SIDE, WIDTH, TOKENS = 32, 48, 16
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": WIDTH, "layers": 2, "head_width": 12},
    "text_cfg": {"context_length": TOKENS, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
THINGS = ("a red kite", "a dog", "the old tower", "a boat", "two cups", "a lamp")


def tiny_towers(folder: Path) -> str:
    """The config file of a small open_clip model."""
    file = folder / "locfast-cloc.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def make(text: str, **fields: Any) -> Cloc:
    """In fp64, its weights far from zeros and ones."""
    method = Cloc(ClocConfig(text=text, **fields), model="open_clip", pretrained=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.ndim:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return method.double()


def records() -> list[Record]:
    """Eight: three without any region, one of whose regions none is of use, captions and phrases that occur twice."""
    box = torch.rand(40, 2, 2, generator=torch.Generator().manual_seed(2)).sort(1).values.flatten(1) * 24
    boxes = [(left, top, left + w / 2 + 4, top + h / 2 + 4) for left, top, w, h in box.tolist()]
    nan = float("nan")

    def regions(first: int, *names: int) -> tuple[Region, ...]:
        return tuple(Region(boxes[first + i], THINGS[name]) for i, name in enumerate(names))  # type: ignore[arg-type]

    bad = (Region((9, 3, 2, 8), "swapped"), Region((1, nan, 5, 8), "not a number"), Region((1, 1, 9, 9), "  "))
    return [
        Record(b"", text="a kite over a tower", regions=regions(0, 0, 2)),
        Record(b"", text="a harbour", regions=regions(4, 3, 3, 3, 4, 5, 1, 0)),
        Record(b"", text="nothing much"),
        Record(b"", text="a harbour", regions=()),
        Record(b"", text="a dog in a room", regions=(bad[0], *regions(12, 1), bad[1])),
        Record(b"", text="a room", regions=bad),
        Record(b"", text="six things", regions=regions(16, 0, 1, 2, 3, 4, 5)),
        Record(b"", text="a lamp", regions=regions(24, 5)),
    ]


def batch_of(rows: list[int]) -> dict[str, Any]:
    """A micro-batch whose views are the images as they are."""
    images = torch.randn(8, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    count, given = len(rows), records()
    frame = torch.tensor([[0.0, 0.0, SIDE, SIDE]]).expand(count, 4)
    sizes = torch.full((count, 2), SIDE)
    geometry = Geometry(frame, frame, torch.zeros(count, dtype=torch.bool), sizes, (SIDE, SIDE))
    index = torch.tensor(rows)
    return {
        "views": {"image": images[rows]},
        "geometry": {"image": geometry},
        "records": [given[row] for row in rows],
        "index": index,
        "epoch": torch.zeros_like(index),
    }


def gradients(method: Cloc, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(named[n]) if g is None else g for n, g in zip(named, found, strict=True)}


def good_regions(record: Record) -> list[Region]:
    """Of these records: a box is whole inside its image, or of no use at all."""
    return [r for r in record.regions or () if r.text.strip() and r.box[2] > r.box[0] and r.box[3] > r.box[1]]


def chosen(record: Record, places: Tensor) -> list[Region]:
    """One after the other is drawn from those that are left."""
    left, taken = good_regions(record), []
    for place in places.tolist():
        if left:
            taken.append(left.pop(int(place * len(left))))
    return taken


def plainly(method: Cloc, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Equations 1 to 4 over one batch: image by image, region by region, pair by pair."""
    config, image_embeddings, text_embeddings = method.config, [], []
    regions: list[Tensor] = []
    phrases: list[Tensor] = []
    distances: list[Tensor] = []
    some = 0

    def text(words: str) -> Tensor:
        return method.text(method.text.tokenize([words]))[0]

    for image, record, places in zip(batch["views"]["image"], batch["records"], draw.regions, strict=True):
        tokens = method.image.backbone(image[None])
        image_embeddings.append(method.image.embed(tokens)[0])
        text_embeddings.append(text(record.text or ""))
        taken = chosen(record, places)
        some += bool(taken)
        for region in taken:
            box = torch.tensor([region.box]) / SIDE  # fp32, as the data layer gives them
            asked = method.prompter.ask(tokens[:, 1:])
            regions.append(method.prompter.boxes(asked, box)[0])
            phrases.append(text(region.text))
            if config.grounding:
                found = method.box_head(method.prompter.phrases(asked, phrases[-1][None]))[0]
                distances.append(((found - box[0]).square().sum() + config.grounding_eps**2).sqrt())

    clip = info_nce(image_embeddings, text_embeddings, method.scale(), None)
    region = info_nce(regions, phrases, method.region_scale(), config.filter_threshold)
    weight = some / len(batch["records"]) if config.region_weight is None else config.region_weight
    told = {"clip": clip, "region": region, "loss": clip + weight * region}
    if config.grounding:
        told["grounding"] = torch.stack(distances).sum() / (4 * len(distances))
        told["loss"] = told["loss"] + weight * told["grounding"]
    return told


def info_nce(ones: list[Tensor], others: list[Tensor], scale: Tensor, threshold: float | None) -> Tensor:
    """The mean of both directions; j is no negative of i where their texts lie nearer than the threshold."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a, b, dim=0, eps=1e-12)

    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(ones)):
        kept = [
            j
            for j in range(len(ones))
            if j == i or threshold is None or cosine(others[i], others[j]).item() <= threshold
        ]
        to_texts = torch.stack([scale * cosine(ones[i], others[j]) for j in kept])
        to_ones = torch.stack([scale * cosine(ones[j], others[i]) for j in kept])
        right = scale * cosine(ones[i], others[i])
        total = total - (2 * right - to_texts.logsumexp(0) - to_ones.logsumexp(0)) / 2
    return total / len(ones)


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-7) -> None:
    """Gradients by name; both kept in fp64, scales in fp32."""
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        largest = gradient.abs().max().item()
        assert math.isfinite(largest)
        torch.testing.assert_close(
            found[name], gradient, rtol=rtol, atol=rtol * largest + 1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )
