"""Resampling on the CPU: PIL's filters, by torch where it has them (three to four times faster), else by PIL."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from locfast.data.crop import Plan

RESAMPLING = {each.name.lower(): each for each in Image.Resampling}
IN_TORCH = ("bilinear", "bicubic")

WORTH = 3.0
"""Torch resizes a whole image, PIL just the part that a view shows. Torch is taken as long as the whole has at most
so many times the pixels of the view."""


def resize(pixels: np.ndarray, plan: Plan, reduced: int = 1, before: tuple[int, int] = (0, 0)) -> np.ndarray:
    """The part of a view that shows the image: uint8 RGB [H, W, 3] -> [h, w, 3], neither padded nor flipped.

    `pixels` are the upright image at 1/`reduced` of its size: pixel x covers x * reduced .. (x + 1) * reduced. Where
    that does not divide the size of an image that was turned, the first row and column begin `before` (y, x) it.
    """
    x0, y0, x1, y1 = plan.inside
    left, right = ((edge + before[1]) / reduced for edge in plan.box[::2])
    top, bottom = ((edge + before[0]) / reduced for edge in plan.box[1::2])
    right, bottom = min(right, pixels.shape[1]), min(bottom, pixels.shape[0])
    size = (y1 - y0, x1 - x0)
    if plan.resized is None and all(edge.is_integer() for edge in (left, top, right, bottom)):
        pixels = pixels[int(top) : int(bottom), int(left) : int(right)]
        if pixels.shape[:2] == size:
            return pixels
        if plan.interpolation in IN_TORCH:
            return _by_torch(pixels, size, plan.interpolation)
        return _by_pil(pixels, size, plan.interpolation, (0, 0, pixels.shape[1], pixels.shape[0]))
    if plan.resized is not None and plan.interpolation in IN_TORCH and reduced == 1:
        height, width = plan.resized
        if height * width <= WORTH * plan.size[0] * plan.size[1]:
            # of a resized image larger than the view, the box begins at a whole pixel
            y, x = round(top * height / pixels.shape[0]), round(left * width / pixels.shape[1])
            return _by_torch(pixels, plan.resized, plan.interpolation)[y : y + size[0], x : x + size[1]]
    # With a box, PIL's filters still see the pixels around it, so this equals resizing everything and cropping.
    return _by_pil(pixels, size, plan.interpolation, (left, top, right, bottom))


def _by_torch(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    # channels last: the layout that torch's kernel for 8 bits wants, and that the pixels have
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _by_pil(
    pixels: np.ndarray, size: tuple[int, int], interpolation: str, box: tuple[float, float, float, float]
) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize(size[::-1], RESAMPLING[interpolation], box=box))


def place(part: np.ndarray, plan: Plan) -> np.ndarray:
    """The view [h, w, 3] of `plan` around what `resize` gave: filled where it shows no image, then flipped."""
    x0, y0, x1, y1 = plan.inside
    height, width = plan.size
    if plan.border is not None:
        view = np.full((height, width, 3), plan.border, np.uint8)
        view[y0:y1, x0:x1] = part
        part = view
    elif plan.inside != (0, 0, width, height):
        part = np.pad(part, ((y0, height - y1), (x0, width - x1), (0, 0)), mode="reflect")
    # torch turns a view in 0.06 ms, a copy out of numpy's mirrored strides takes 0.4
    return torch.from_numpy(part).flip(1).numpy() if plan.flip else part
