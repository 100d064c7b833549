"""Carrying boxes and label maps from source pixels into a view."""

from __future__ import annotations

import torch
from torch import Tensor

from locfast.data.spec import Geometry


def apply_to_boxes(geometry: Geometry, row: int, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [R, 4] (left, top, right, bottom in source pixels) in pixels of the view of sample `row`.

    Returns the boxes [R, 4] fp32, clipped to the part that the view shows, and the share [R] of each box's area that
    is shown (0: outside, the clipped box is empty).
    """
    carried, share = carry(geometry, torch.full((len(boxes),), row), boxes.double())
    return carried.float(), share.float()


def carry(geometry: Geometry, rows: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_to_boxes` for boxes [K, 4] fp64 of any samples: `rows` [K] int64 says whose each is. Both in fp64."""
    shown, inside = geometry.box[rows].double(), geometry.inside[rows].double()
    first, last = inside[:, None, :2], inside[:, None, 2:]
    start = shown[:, None, :2]
    corners = (boxes.view(-1, 2, 2) - start) * ((last - first) / (shown[:, None, 2:] - start)) + first
    clipped = corners.clamp(first, last)
    area, area_shown = (corners[:, 1] - corners[:, 0]).prod(-1), (clipped[:, 1] - clipped[:, 0]).prod(-1)
    share = torch.where(area > 0, area_shown / area, 0)
    left, top, right, bottom = clipped.flatten(1).unbind(-1)
    flip, width = geometry.flip[rows], geometry.size[1]
    mirrored = torch.where(flip, width - right, left), torch.where(flip, width - left, right)
    return torch.stack([mirrored[0], top, mirrored[1], bottom], -1), share


def apply_to_label_map(geometry: Geometry, row: int, label_map: Tensor, ignore: int = 255) -> Tensor:
    """A label map [H, W] of sample `row`'s source (at any resolution) in its view: nearest neighbour, [h, w].

    Padding holds `ignore`: reflected pixels are no second look at a thing.
    """
    y, inside_y = _nearest(geometry, row, 0, label_map.shape[0])
    x, inside_x = _nearest(geometry, row, 1, label_map.shape[1])
    return torch.where(inside_y[:, None] & inside_x, label_map[y[:, None], x], ignore)


def _nearest(geometry: Geometry, row: int, axis: int, length: int) -> tuple[Tensor, Tensor]:
    """For every view pixel along `axis` (0: y, 1: x): the label pixel under its centre, and whether there is one."""
    first, last = 1 - axis, 3 - axis
    shown, inside = geometry.box[row].double(), geometry.inside[row].double()
    center = torch.arange(geometry.size[axis], dtype=torch.float64) + 0.5
    if axis == 1 and geometry.flip[row]:
        center = geometry.size[1] - center
    there = (center > inside[first]) & (center < inside[last])
    source = (center - inside[first]) * (shown[last] - shown[first]) / (inside[last] - inside[first]) + shown[first]
    pixel = (source * (length / geometry.source_size[row, axis].item())).floor().long()
    return pixel.clamp(0, length - 1), there
