"""PIL's resampling filters as matrices: what resizing means, in plain torch, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from locfast.data.crop import Plan
from locfast.data.decode.reflect import source_pixels


def _linear(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x < 3, torch.sinc(x) * torch.sinc(x / 3), 0)


KERNELS = {"bilinear": _linear, "bicubic": _cubic, "lanczos": _lanczos}
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
"""Half the width of a filter, in pixels of the coarser of source and view."""


def seen(plan: Plan, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in whole source pixels of what the filter of a view sees of an image of `size`."""
    ends: list[tuple[int, int]] = []
    for axis in (1, 0):
        first, last, scale = _along(plan, axis)
        around = 0.0 if plan.resized is None else SUPPORT[plan.interpolation] * max(1.0, scale) + 1
        ends.append((max(0, math.floor(first - around)), min(size[axis], math.ceil(last + around))))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def _along(plan: Plan, axis: int) -> tuple[float, float, float]:
    """First and last edge of the box along `axis` (0: y, 1: x), and source pixels per view pixel."""
    first, last = plan.box[1 - axis], plan.box[3 - axis]
    return first, last, (last - first) / (plan.inside[3 - axis] - plan.inside[1 - axis])


def matrix(plan: Plan, axis: int, first: int, last: int, device: torch.device) -> Tensor:
    """Weights [view, last - first] fp32 of the source pixels first .. last - 1 in every view pixel along `axis`.

    Reflection and flip are in it: rows of reflected places repeat.
    """
    start, _, scale = _along(plan, axis)
    place = source_pixels([plan], axis)[0].to(device, torch.float32)
    center = start + (place + 0.5) * scale
    pixel = torch.arange(first, last, device=device, dtype=torch.float32) + 0.5
    weight = KERNELS[plan.interpolation]((pixel - center[:, None]).abs() / max(1.0, scale))
    return weight / weight.sum(1, keepdim=True)


def resample(image: Tensor, plan: Plan) -> Tensor:
    """A view of an upright image: uint8 [3, H, W] -> levels 0 .. 255 in fp32 [3, h, w], whole numbers as PIL's are.

    PIL resizes rows first and rounds to 8 bits in between, and so does this.
    """
    if plan.border is not None:
        return _padded(image, plan, plan.border)
    left, top, right, bottom = seen(plan, (image.shape[1], image.shape[2]))
    part = image[:, top:bottom, left:right].contiguous().float()  # decoders give rows of RGB
    rows = (part @ matrix(plan, 1, left, right, image.device).T).round_().clamp_(0, 255)
    return (matrix(plan, 0, top, bottom, image.device) @ rows).round_().clamp_(0, 255)


def _padded(image: Tensor, plan: Plan, border: tuple[int, int, int]) -> Tensor:
    left, top, right, bottom = plan.inside
    size = (bottom - top, right - left)
    part = resample(image, replace(plan, size=size, inside=(0, 0, size[1], size[0]), border=None))
    if plan.flip:
        left, right = plan.size[1] - right, plan.size[1] - left
    view = torch.empty(3, *plan.size, device=image.device)
    for channel, level in zip(view, border, strict=True):  # a tensor of levels would wait for the GPU
        channel.fill_(level)
    view[:, top:bottom, left:right] = part
    return view


def resample_all(images: Sequence[Tensor], plans: Sequence[Plan]) -> Tensor:
    """One view of every image, [B, 3, h, w] fp32."""
    return torch.stack([resample(image, plan) for image, plan in zip(images, plans, strict=True)])
