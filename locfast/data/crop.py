"""Where a view lies in its image: every crop policy as a function of sizes and random numbers, before any decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from locfast.data.spec import PADDING, Geometry, View
from locfast.random import Keys, uniform

RATIO = (3 / 4, 4 / 3)
"""Range of a random change of aspect ratio."""
ATTEMPTS = 10
"""How often a random resized crop that does not fit is drawn again."""


@dataclass(frozen=True)
class Plan:
    """How one view is made: resize `box` onto the rectangle `inside` of the view, fill the rest, flip."""

    size: tuple[int, int]  # height, width of the view
    box: tuple[float, float, float, float]  # left, top, right, bottom in source pixels (after EXIF rotation)
    inside: tuple[int, int, int, int]  # left, top, right, bottom in view pixels, before the flip
    flip: bool
    interpolation: str  # a filter of PIL, in small letters
    resized: tuple[int, int] | None = None
    """Height and width of the whole image once it is resized, where a view is cut out of that: its filter sees the
    pixels around the box. None: the box is cut out first, and the filter sees nothing around it, which is what
    torchvision's random resized crop does."""
    border: tuple[int, int, int] | None = None
    """RGB levels of what lies around `inside`; None: the image is reflected into it."""

    @property
    def shrink(self) -> float:
        """Source pixels per view pixel, along the axis where there are fewest."""
        left, top, right, bottom = self.box
        x0, y0, x1, y1 = self.inside
        return min((right - left) / (x1 - x0), (bottom - top) / (y1 - y0))


def draw_numbers(view: View, name: str, keys: Keys) -> np.ndarray:
    """The random numbers of view `name` for each sample: [B, count] float64 in [0, 1), stream crop.<name>."""
    count = {"random_resized": 2 + 4 * ATTEMPTS, "zoom_center": 6, "simple_resized": 4}.get(view.crop, 2)
    return uniform(keys, f"crop.{name}", count).double().numpy()


def plan(view: View, source: tuple[int, int], numbers: Sequence[float]) -> Plan:
    """The plan of a view of an image with `source` = (height, width), from `draw_numbers` of its sample."""
    flip, interpolation, *rest = numbers
    height, width = source
    if view.crop == "random_resized":
        box, inside, resized = _random_box(height, width, view.scale, rest), (0, 0, view.size[1], view.size[0]), None
    else:
        resized = _resized(view, source, rest)
        if view.crop == "simple_resized":
            y, x = map(_padded_window, source, resized, view.size, rest)
        else:
            y, x = map(_window, source, resized, view.size)
        box = (x.source_start, y.source_start, x.source_end, y.source_end)
        inside = (x.start, y.start, x.end, y.end)
    chosen = ("bilinear", "bicubic")[interpolation >= 0.5] if view.interpolation == "random" else view.interpolation
    border = border_of(view) if view.crop == "pad" else None
    return Plan(view.size, box, inside, view.flip and flip < 0.5, chosen, resized, border)


def border_of(view: View) -> tuple[int, int, int]:
    """The colour around an image that is padded: zero once it is normalised, up to the rounding to 8 bits.

    Reflected pixels would show objects a second time, which no box covers.
    """
    red, green, blue = (min(255, max(0, round(255 * mean))) for mean in view.mean)
    return red, green, blue


def _resized(view: View, source: tuple[int, int], numbers: Sequence[float]) -> tuple[int, int]:
    """Height and width that the whole image is resized to before a part of it is taken."""
    height, width = source
    if view.crop == "pad":  # the long side exact and the other one rounded down, as tf.image.resize_with_pad does
        if height * view.size[1] > width * view.size[0]:
            return view.size[0], max(1, width * view.size[0] // height)
        return max(1, height * view.size[1] // width), view.size[1]
    # timm's evaluation transform rounds the size before the crop down.
    share = 1.0 if view.crop == "simple_resized" else view.crop_pct
    target = tuple(math.floor(side / share) for side in view.size)
    if view.crop == "squash":
        return target[0], target[1]
    if view.crop in ("center", "simple_resized"):
        if target[0] == target[1]:  # torchvision's Resize(int): the short side is exact, the long one rounded down
            short, long = min(source), target[0] * max(source) // min(source)
            return (target[0], long) if height == short else (long, target[0])
        ratio = min(height / target[0], width / target[1])
        return round(height / ratio), round(width / ratio)
    # zoom_center: timm's ResizeKeepRatio with random_scale_area, as in its training crop mode rkrc.
    zoomed, area, changed, aspect = numbers
    ratio = min(height / view.size[0], width / view.size[1])
    factor = 1 / math.sqrt(_between(view.scale, area)) if zoomed < 0.5 else 1.0
    change = math.exp(_log_between(RATIO, aspect) / 2) if changed < 0.5 else 1.0
    # A picture of 3000 x 1 must not vanish along its short side.
    return max(1, round(height * factor / change / ratio)), max(1, round(width * factor * change / ratio))


@dataclass(frozen=True)
class _Window:
    source_start: float
    source_end: float
    start: int
    end: int


def _window(source: int, resized: int, view: int) -> _Window:
    """One axis of taking the centre of a resized image, or of putting it in the middle of a larger view."""
    if resized < view:
        start = (view - resized) // 2
        return _Window(0.0, float(source), start, start + resized)
    start = round((resized - view) / 2)
    scale = source / resized
    return _Window(start * scale, min((start + view) * scale, source), 0, view)


def _padded_window(source: int, resized: int, view: int, number: float) -> _Window:
    """One axis of a random crop of a resized image that was padded by reflection; every offset is as likely.

    A view is so much larger than the padding that it shows the pixels that are reflected into it.
    """
    first = int(number * (resized + 2 * PADDING - view + 1)) - PADDING
    shown, end = max(0, first), min(resized, first + view)
    scale = source / resized
    return _Window(shown * scale, min(end * scale, source), shown - first, end - first)


def _random_box(
    height: int, width: int, scale: tuple[float, float], numbers: Sequence[float]
) -> tuple[float, float, float, float]:
    """torchvision's random resized crop: area and log aspect ratio uniform, whole pixels, else the centre."""
    for attempt in range(ATTEMPTS):
        area, aspect, y, x = numbers[4 * attempt : 4 * attempt + 4]
        pixels = height * width * _between(scale, area)
        ratio = math.exp(_log_between(RATIO, aspect))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _between(limits: tuple[float, float], share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * share


def _log_between(limits: tuple[float, float], share: float) -> float:
    return math.log(limits[0]) + (math.log(limits[1]) - math.log(limits[0])) * share


def geometry(plans: Sequence[Plan], sources: Sequence[tuple[int, int]]) -> Geometry:
    """The plans of one view over a batch, as tensors."""
    return Geometry(
        box=torch.tensor([p.box for p in plans], dtype=torch.float32),
        inside=torch.tensor([p.inside for p in plans], dtype=torch.float32),
        flip=torch.tensor([p.flip for p in plans]),
        source_size=torch.tensor(sources, dtype=torch.int64),
        size=plans[0].size,
    )
