"""Scenes: a deterministic generator of small pictures with several objects and an exact label map.

An object is a body of one colour with a core of another, and its class is that ordered pair ("blue in red"). One patch
inside a core shows blue alone, one on the rim red alone; either colour, and both side by side, also occur where two
objects touch. So a model has to put an object's patches together to name them, as it has to in photographs, yet a
small ViT learns the classes within minutes, which it does not for shapes.

Every number comes from `locfast.random`, keyed by (seed, epoch 0, scene number), and pixels are computed with
additions, products, divisions, square roots and comparisons only (no sines, no matrix products), all correctly rounded:
a scene has the same bits on every device and in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locfast.data.scene_words import boxes_in_sight, caption, phrase
from locfast.data.spec import Record, Region
from locfast.random import Keys, randint, random_words, uniform

SIZE = 48
"""Height and width of a scene in pixels."""
MAX_OBJECTS = 4
COLORS = {
    "red": (0.95, 0.15, 0.12),
    "green": (0.15, 0.85, 0.20),
    "blue": (0.15, 0.35, 1.00),
    "yellow": (0.95, 0.85, 0.10),
}
PAIRS = tuple((body, core) for body in range(len(COLORS)) for core in range(len(COLORS)) if body != core)
CLASSES = ("unlabeled", *(f"{tuple(COLORS)[core]} in {tuple(COLORS)[body]}" for body, core in PAIRS))
"""Class names by id. 0 is the ground, as in COCO-Stuff maps shifted by one (the paper's probe)."""
SHAPES = ("disc", "square")
PHRASES = tuple(
    tuple(phrase(tuple(COLORS)[body], tuple(COLORS)[core], shape) for shape in SHAPES) for body, core in PAIRS
)
"""What a region's text calls an object, by its pair of colours and its shape: "a red disc with a blue core"."""
MIN_VISIBLE = 24
"""Pixels of a class that must be in sight for it to count as present in an image-level label; pixels of an object that
must be in sight for it to be a region and to be named in the caption."""


def _ground(keys: Keys) -> Tensor:
    """Dark grounds with soft blotches, a tint and fine grain: [B, 3, SIZE, SIZE] fp32 in 0 .. 0.45."""
    batch, device, cells = len(keys), keys.index.device, 6
    knots = uniform(keys, "scene.ground.blotches", (cells + 1) ** 2).view(batch, cells + 1, cells + 1)
    tint = uniform(keys, "scene.ground.tint", 5)
    # Four grains of 8 bits from every word: half of a scene's time went into these words otherwise.
    words = random_words(keys, "scene.ground.grain", SIZE * SIZE // 4)
    shifts = torch.arange(0, 32, 8, device=device)
    grain = ((words[..., None] >> shifts) & 255).view(batch, SIZE, SIZE).to(torch.float32) / 256
    place = (torch.arange(SIZE, device=device) + 0.5) * (cells / SIZE)
    cell = place.long()
    fraction = place - cell
    rows = knots[:, cell] + (knots[:, cell + 1] - knots[:, cell]) * fraction[:, None]
    blotches = rows[:, :, cell] + (rows[:, :, cell + 1] - rows[:, :, cell]) * fraction
    level, contrast = tint[:, 3, None, None] * 0.12, 0.05 + tint[:, 4, None, None] * 0.15
    light = level + blotches * contrast + grain * 0.06
    return light[:, None] * (0.7 + 0.6 * tint[:, :3, None, None])


def _rim_distance(square: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the rim of a disc of radius 1 or of a square of the same area, negative inside."""
    disc = (x * x + y * y).sqrt() - 1
    return torch.where(square, torch.maximum(x.abs(), y.abs()) - 0.886, disc)


@dataclass(frozen=True)
class Scenes:
    """Scenes as they are drawn, all uint8."""

    image: Tensor  # [B, 3, SIZE, SIZE]
    front: Tensor  # [B, SIZE, SIZE]: the object in sight at a pixel, from 1 on; 0: the ground
    kind: Tensor  # [B, MAX_OBJECTS]: each object's class, an index of PAIRS
    shape: Tensor  # [B, MAX_OBJECTS]: an index of SHAPES

    def label(self) -> Tensor:
        """Ids of CLASSES [B, SIZE, SIZE] uint8."""
        ids = torch.nn.functional.pad(self.kind + 1, (1, 0))
        return ids.gather(1, self.front.flatten(1).long()).view_as(self.front)


def render_scenes(keys: Keys, max_objects: int = MAX_OBJECTS) -> tuple[Tensor, Tensor]:
    """Images [B, 3, SIZE, SIZE] uint8 and label maps [B, SIZE, SIZE] uint8 (ids of CLASSES) of `draw_scenes`."""
    scenes = draw_scenes(keys, max_objects)
    return scenes.image, scenes.label()


def draw_scenes(keys: Keys, max_objects: int = MAX_OBJECTS) -> Scenes:
    """Draw the scenes of `keys`, each with 1 .. `max_objects` objects, later ones in front of earlier ones.

    All is on the device of `keys`. A scene drawn with fewer `max_objects` shows the first of the same objects.
    """
    device = keys.index.device
    number = 1 + randint(keys, "scene.count", 1, max_objects)[:, 0]
    kind = randint(keys, "scene.class", MAX_OBJECTS, len(PAIRS))
    draws = uniform(keys, "scene.object", MAX_OBJECTS * 16).view(len(keys), MAX_OBJECTS, 16)
    palette = torch.tensor(list(COLORS.values()), device=device)
    pairs = torch.tensor(PAIRS, device=device)

    image = _ground(keys)
    front = torch.zeros(len(keys), SIZE, SIZE, dtype=torch.uint8, device=device)
    pixel = torch.arange(SIZE, device=device) + 0.5
    for layer in range(min(MAX_OBJECTS, max_objects)):
        d = draws[:, layer, :, None, None]
        present = (layer < number)[:, None, None]
        radius = 7 + 7 * d[:, 0]
        cx, cy = 5 + (SIZE - 10) * d[:, 1], 5 + (SIZE - 10) * d[:, 2]
        # A rotation by up to 43 degrees either way, from the rational parametrisation of the circle.
        t = (d[:, 3] - 0.5) * 0.8
        cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        dx, dy = (pixel - cx) / radius, (pixel[:, None] - cy) / radius
        x, y = dx * cos + dy * sin, dy * cos - dx * sin
        distance = _rim_distance(d[:, 4] < 0.5, x, y)
        core_size = 0.5 + 0.15 * d[:, 5]
        # Light falls across an object from one side, so that its inside is no flat area.
        shade = (1 + 0.3 * ((d[:, 6] - 0.5) * x + (d[:, 7] - 0.5) * y))[:, None]
        body, core = (
            (palette[pairs[kind[:, layer], part]] + (draws[:, layer, 8 + 4 * part : 11 + 4 * part] - 0.5) * 0.2)
            * (0.7 + 0.3 * draws[:, layer, 11 + 4 * part, None])
            for part in (0, 1)
        )
        # Edges are one pixel wide; the core's rim is where the distance from the body's rim is 1 - core_size.
        cover = (0.5 - distance * radius).clamp(0, 1) * present
        in_core = (0.5 - (distance + 1 - core_size) * radius).clamp(0, 1)[:, None]
        body, core = body[:, :, None, None], core[:, :, None, None]
        paint = ((body + (core - body) * in_core) * shade).clamp(0, 1)
        image = image + (paint - image) * cover[:, None]
        front = torch.where(cover > 0.5, layer + 1, front)
    shape = (draws[:, :, 4] < 0.5).byte()
    return Scenes((image.clamp(0, 1) * 255 + 0.5).to(torch.uint8), front, kind.byte(), shape)


def scene_keys(seed: int, start: int, count: int, device: torch.device | str = "cpu") -> Keys:
    """Keys of the scenes start .. start + count - 1 of the stream `seed`."""
    index = torch.arange(start, start + count, device=device)
    return Keys(seed, torch.zeros_like(index), index)


def present_classes(label: Tensor, min_pixels: int = MIN_VISIBLE) -> Tensor:
    """Which object classes are in sight: label maps [B, H, W] -> [B, len(CLASSES) - 1] bool (the ground left out)."""
    ids = torch.arange(1, len(CLASSES), dtype=label.dtype, device=label.device)
    return (label.flatten(1)[:, None] == ids[:, None]).sum(-1) >= min_pixels


class SceneSource:
    """Scenes `start` .. `start + length - 1` of the stream `seed`, as encoded records: a P6 image, a P5 label map, the
    box and the phrase of every object in sight (those behind first), and a caption that names them all.

    Scenes are drawn a block at a time and every block is kept (10 KB a scene), so reading in any order is fast.
    """

    block = 256

    def __init__(self, length: int, seed: int = 0, start: int = 0, max_objects: int = MAX_OBJECTS) -> None:
        self.length, self.seed, self.start, self.max_objects = length, seed, start, max_objects
        self._blocks: dict[int, tuple[Tensor, Tensor, list[tuple[Region, ...]]]] = {}

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"scene-{self.seed}-{self.start + index}"

    def tensors(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Images [count, 3, SIZE, SIZE] and label maps [count, SIZE, SIZE], uint8, of scenes in a row."""
        scenes = self._scenes(start, count)
        return scenes.image, scenes.label()

    def _scenes(self, start: int, count: int) -> Scenes:
        return draw_scenes(scene_keys(self.seed, self.start + start, count), self.max_objects)

    def read(self, index: int) -> Record:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        block, row = divmod(index, self.block)
        if block not in self._blocks:
            self._blocks[block] = self._drawn(block * self.block, min(self.block, self.length - block * self.block))
        images, labels, said = self._blocks[block]
        regions = said[row]
        return Record(
            image=b"P6 %d %d 255\n" % (SIZE, SIZE) + images[row].numpy().tobytes(),
            name=self.name(index),
            text=caption([region.text for region in regions]),
            regions=regions,
            label_map=b"P5 %d %d 255\n" % (SIZE, SIZE) + labels[row].numpy().tobytes(),
        )

    def _drawn(self, start: int, count: int) -> tuple[Tensor, Tensor, list[tuple[Region, ...]]]:
        scenes = self._scenes(start, count)
        boxes = boxes_in_sight(scenes.front, MAX_OBJECTS, MIN_VISIBLE)
        pixels = scenes.image.permute(0, 2, 3, 1).contiguous()
        objects = zip(boxes.tolist(), scenes.kind.tolist(), scenes.shape.tolist(), strict=True)
        return pixels, scenes.label(), [_regions(*each) for each in objects]

    def __repr__(self) -> str:
        return f"{len(self)} scenes of the demo, seed {self.seed}"


def _regions(boxes: list[list[int]], kinds: list[int], shapes: list[int]) -> tuple[Region, ...]:
    """The objects of a scene that are in sight; a box of -1 is of one that is not."""
    return tuple(
        Region((float(left), float(top), float(right), float(bottom)), PHRASES[kind][shape])
        for (left, top, right, bottom), kind, shape in zip(boxes, kinds, shapes, strict=True)
        if left >= 0
    )
