"""Boxes lie where their pixels are, to half a pixel of the view: rectangles are painted, encoded, loaded, found."""

import numpy as np
import pytest
import torch
from PIL import Image

from locfast.data.loader import Loader
from locfast.data.regions.in_view import regions_in_view
from locfast.data.spec import ImageSpec, Record, Region, View

COUNT = 240
LIMIT = 0.25
"""View pixels that a box may be off where half a pixel is promised: the edges found here are 0.14 off by themselves."""
HALF = (0.5,) * 3
SIDE = 4.0
"""View pixels that a rectangle has at least: of smaller ones a filter leaves no edge to find."""
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How an upright picture is stored under each mark of its orientation."""
VIEWS = {
    "center": View((64, 80), HALF, HALF, crop_pct=0.9, flip=True),
    "zoom_center": View((64, 80), HALF, HALF, crop="zoom_center", interpolation="random", flip=True),
    "random_resized": View((72, 72), HALF, HALF, crop="random_resized", scale=(0.2, 1.0), flip=True),
    "simple_resized": View((64, 80), HALF, HALF, crop="simple_resized", flip=True),
    "squash": View((80, 64), HALF, HALF, crop="squash", interpolation="lanczos", flip=True),
    "pad": View((72, 72), HALF, HALF, crop="pad", flip=True),
    "pad, tall": View((90, 61), HALF, HALF, crop="pad", interpolation="bilinear", flip=True),
}


class Rectangles:
    """White rectangles on black, one a picture, in files of all sizes and orientations; a region says where each is."""

    def __init__(self, encode, *kinds: tuple[str, dict]) -> None:
        self.encode, self.kinds = encode, kinds

    def __len__(self) -> int:
        return COUNT

    def read(self, index: int) -> Record:
        random = np.random.default_rng(index)
        height, width = random.integers(24, 300, 2)
        left, top = random.integers(0, width - 6), random.integers(0, height - 6)
        right, bottom = random.integers(left + 6, width + 1), random.integers(top + 6, height + 1)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[top:bottom, left:right] = 255
        image, exif = Image.fromarray(pixels), Image.Exif()
        orientation = int(random.integers(1, 9))
        kind, options = self.kinds[index % len(self.kinds)]
        if kind != "PPM" and orientation in STORED:
            exif[0x0112] = orientation
            image, options = image.transpose(STORED[orientation]), options | {"exif": exif}
        box = (float(left), float(top), float(right), float(bottom))
        return Record(self.encode(image, kind, **options), f"{index}", regions=(Region(box, "a rectangle"),))


def edges(line: np.ndarray) -> tuple[float, float]:
    """First and last place along a line of pixels where it passes from black to white.

    Half way between two centres; at the rim, where no black pixel follows, by how white the last one is.
    """
    bright = np.flatnonzero(line > 0.5)
    return _end(line[::-1], len(line) - 1 - bright[0]), len(line) - _end(line, bright[-1])


def _end(line: np.ndarray, last: int) -> float:
    """How far before the end of a line the white ends whose last pixel is `last`."""
    value = line[last]
    if last + 1 == len(line):
        return 1 - min(1.0, value)
    return len(line) - (last + 0.5 + (value - 0.5) / (value - line[last + 1]))


def off(view: np.ndarray, box: np.ndarray, inside: np.ndarray) -> float:
    """How far a box (in view pixels) is from the edges of the white rectangle in a view, where that shows its image."""
    x0, y0, x1, y1 = inside
    part = view[y0:y1, x0:x1]
    middle_x, middle_y = ((box[:2] + box[2:]) / 2 - (x0, y0)).astype(int)
    left, right = edges(part[middle_y])
    top, bottom = edges(part[:, middle_x])
    return np.abs(box - (left + x0, top + y0, right + x0, bottom + y0)).max()


def furthest(source: Rectangles, view: View, **options) -> tuple[float, int]:
    """The largest distance over the rectangles that are in sight, and their number."""
    loader = Loader(source, ImageSpec({"image": view}, records=True, regions=True), seed=3, workers=0, **options)
    worst, seen = 0.0, 0
    height, width = view.size
    for batch in loader.batches(torch.arange(start, start + 60) for start in range(0, COUNT, 60)):
        place = batch["geometry"]["image"]
        found = regions_in_view(batch["records"], place, min_side=SIDE)
        images = (batch["views"]["image"][:, 0] * 0.5 + 0.5).numpy()
        for row in torch.nonzero(found.count).flatten().tolist():
            x0, y0, x1, y1 = place.inside[row].long().tolist()
            inside = (width - x1, y0, width - x0, y1) if place.flip[row] else (x0, y0, x1, y1)
            box = found.boxes[row, 0].double().numpy() * (width, height, width, height)
            worst, seen = max(worst, off(images[row], box, np.array(inside))), seen + 1
        assert not loader.replaced.count
    return worst, seen


@pytest.mark.parametrize("policy", VIEWS)
def test_a_box_is_right_to_half_a_pixel(encode, policy):
    worst, seen = furthest(Rectangles(encode, ("PNG", {}), ("PPM", {})), VIEWS[policy], decoder="cpu")
    assert worst <= LIMIT
    assert seen > COUNT / 3


@pytest.mark.parametrize("policy", ["random_resized", "zoom_center", "pad", "pad, tall"])
def test_a_box_is_right_to_half_a_pixel_in_views_of_a_device_decoder(encode, policy):
    pytest.importorskip("nvidia.dali")
    sharp = ("JPEG", {"quality": 100, "subsampling": 0})
    worst, seen = furthest(Rectangles(encode, sharp), VIEWS[policy], decoder="dali", device="cpu")
    assert worst <= LIMIT
    assert seen > COUNT / 3


def test_a_box_one_pixel_beside_its_place_would_be_seen():
    view = np.zeros((40, 50), np.float32)
    view[10:20, 15:30] = 1
    assert off(view, np.array([15.0, 10, 30, 20]), np.array([0, 0, 50, 40])) == 0
    assert off(view, np.array([16.0, 10, 31, 20]), np.array([0, 0, 50, 40])) == 1
