"""What a model of regions knows of held-out scenes: recognition, retrieval, and boxes that answer to a phrase.

B scenes with R regions in all, K distinct phrases, E joint width. Regions are asked for by their true boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locfast.data.scenes import PHRASES, SHAPES, SIZE, SceneSource
from locfast.data.spec import Record
from locfast.methods.cloc import Cloc
from locfast.models.prompter import RoiPooler

NAMES = tuple(chain.from_iterable(PHRASES))
"""All phrases; neighbours differ in the shape alone."""
POOL = 100
"""Regions that a retrieval among regions chooses from."""
TOP = 10
BATCH = 256


@dataclass(frozen=True)
class TestScenes:
    """Scenes and what is true of them."""

    records: list[Record]
    images: Tensor  # [B, 3, SIZE, SIZE] uint8
    boxes: Tensor  # [R, 4] in [0, 1]
    scene: Tensor  # [R] int64: whose region it is, rising
    phrase: Tensor  # [R] int64: an index of NAMES
    unique: Tensor  # [R] bool: whether no other region of the scene has its phrase

    @staticmethod
    def of(stream: int, count: int, device: torch.device) -> TestScenes:
        """The first `count` scenes of a stream."""
        source = SceneSource(count, seed=stream)
        records = [source.read(i) for i in range(count)]
        regions = [(i, region) for i, record in enumerate(records) for region in record.regions or ()]
        scene = torch.tensor([i for i, _ in regions])
        phrase = torch.tensor([NAMES.index(region.text) for _, region in regions])
        alike = (scene[:, None] == scene) & (phrase[:, None] == phrase)
        tensors = (torch.tensor([region.box for _, region in regions]) / SIZE, scene, phrase, alike.sum(1) == 1)
        boxes, scene, phrase, unique = (tensor.to(device) for tensor in tensors)
        return TestScenes(records, source.tensors(0, count)[0].to(device), boxes, scene, phrase, unique)


@dataclass(frozen=True)
class Known:
    """What a model makes of scenes, in unit vectors."""

    images: Tensor  # [B, E]
    captions: Tensor  # [B, E]
    regions: Tensor  # [R, E]
    phrases: Tensor  # [K, E]
    boxes: Tensor | None  # [R, 4] in [0, 1]: where the region's phrase is said to be; None: the model takes no phrase


@torch.no_grad()
def known(method: Cloc, scenes: TestScenes, *, plain: bool = False) -> Known:
    """Embed scenes and ask for all their regions.

    plain: as CLIP without a region loss is asked, by RoI-align of its projected patch tokens.
    """
    backbone, grounds = method.image.backbone, method.config.grounding and not plain
    prompter = plain_pooler(method) if plain else method.prompter
    mean, std = (
        torch.tensor(side, device=scenes.images.device).view(3, 1, 1) for side in (backbone.mean, backbone.std)
    )

    def texts(words: list[str]) -> Tensor:
        tokens = method.text.tokenize(words).to(scenes.images.device)
        return torch.cat([method.text(some) for some in tokens.split(BATCH)])

    phrases = texts(list(NAMES))
    captions = texts([record.texts[0] for record in scenes.records])
    images, regions, boxes = [], [], []
    for start in range(0, len(scenes.images), BATCH):
        tokens = backbone((scenes.images[start : start + BATCH].float() / 255 - mean) / std)
        images.append(method.image.embed(tokens))
        own = (scenes.scene >= start) & (scenes.scene < start + BATCH)
        asked, rows = prompter.ask(tokens[:, method.image.num_prefix_tokens :]), scenes.scene[own] - start
        regions.append(prompter.boxes(asked, scenes.boxes[own], rows))
        if grounds and not isinstance(prompter, RoiPooler):
            boxes.append(method.box_head(prompter.phrases(asked, phrases[scenes.phrase[own]], rows)).clamp(0, 1))
    sides = {"images": torch.cat(images), "captions": captions, "regions": torch.cat(regions), "phrases": phrases}
    unit = {name: F.normalize(side, dim=-1) for name, side in sides.items()}
    return Known(**unit, boxes=torch.cat(boxes) if boxes else None)


def plain_pooler(method: Cloc) -> RoiPooler:
    """RoI-align into the joint space by the tower's own projection: nothing that a region loss would have trained."""
    backbone, how = method.image.backbone, {"size": method.config.roi_size}
    pooler = RoiPooler(backbone.embed_dim, method.image.joint_dim, backbone.grid, **how)
    pooler.norm, pooler.project = nn.Identity(), backbone.model.head  # type: ignore[assignment]
    return pooler


def figures_of(found: Known, scenes: TestScenes) -> dict[str, float]:
    """All figures of one model, in percent."""
    answers = (found.regions @ found.phrases.T).argmax(1)
    shapes = len(SHAPES)
    captions = {record.texts[0]: i for i, record in enumerate(scenes.records)}
    same = torch.tensor([captions[record.texts[0]] for record in scenes.records], device=scenes.images.device)
    to_text, to_region = region_retrieval(found, scenes)
    image_to_text, text_to_image = (
        recall(a @ b.T, same[:, None] == same)
        for a, b in ((found.images, found.captions), (found.captions, found.images))
    )
    figures = {
        f"region recognition, {len(NAMES)} phrases": mean_accuracy(answers, scenes.phrase),
        f"region recognition, {len(NAMES) // shapes} pairs of colours": mean_accuracy(
            answers // shapes, scenes.phrase // shapes
        ),
        "region to text, recall@10": to_text,
        "text to region, recall@10": to_region,
        "image to text, recall@10": image_to_text,
        "text to image, recall@10": text_to_image,
    }
    if found.boxes is not None:
        overlap = iou(found.boxes, scenes.boxes)[scenes.unique]
        figures["boxes of phrases, mean IoU"] = overlap.mean().item()
        figures["boxes of phrases, IoU > 0.5"] = (overlap > 0.5).float().mean().item()
    return {name: 100 * value for name, value in figures.items()}


def mean_accuracy(answers: Tensor, truth: Tensor) -> float:
    """The share of right answers by class, and the mean over classes that occur: [R] int64 both."""
    return torch.stack([(answers[truth == k] == k).float().mean() for k in truth.unique()]).mean().item()


def recall(likeness: Tensor, right: Tensor, top: int = TOP) -> float:
    """The share of rows with a right column among their `top` most alike: [Q, G], and bool [Q, G]."""
    nearest = likeness.topk(min(top, likeness.shape[1]), 1).indices
    return right.gather(1, nearest).any(1).float().mean().item()


def region_retrieval(found: Known, scenes: TestScenes) -> tuple[float, float]:
    """Recall@10 from regions to the texts of as many, and back; the mean over pools of POOL regions.

    Equal texts are equally right. What remains behind the last whole pool is left out, unless it is all there is.
    """
    both: list[tuple[float, float]] = []
    for phrase, regions in zip(scenes.phrase.split(POOL), found.regions.split(POOL), strict=True):
        if len(phrase) == POOL or not both:
            likeness, right = regions @ found.phrases[phrase].T, phrase[:, None] == phrase
            both.append((recall(likeness, right), recall(likeness.T, right)))
    to_text, to_region = (sum(side) / len(both) for side in zip(*both, strict=True))
    return to_text, to_region


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes [R, 4], pair by pair; 0 where a corner lies on the wrong side of the other."""
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    common = (high - low).clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (first, second)]
    return common / (areas[0] + areas[1] - common)
