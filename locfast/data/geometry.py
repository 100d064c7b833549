"""Carrying boxes and label maps from source pixels into a view."""

from __future__ import annotations

from torch import Tensor

from locfast.data.spec import Geometry


def apply_to_boxes(geometry: Geometry, row: int, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [R, 4] (left, top, right, bottom in source pixels) in pixels of the view of sample `row`.

    Returns the boxes [R, 4] fp32, clipped to the part that the view shows, and the share [R] of each box's area that
    is shown (0: outside, the clipped box is empty).
    """
    raise NotImplementedError


def apply_to_label_map(geometry: Geometry, row: int, label_map: Tensor, ignore: int = 255) -> Tensor:
    """A label map [H, W] of sample `row`'s source (at any resolution) in its view: nearest neighbour, [h, w].

    Padding holds `ignore`: reflected pixels are no second look at a thing.
    """
    raise NotImplementedError
