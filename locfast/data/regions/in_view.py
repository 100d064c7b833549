"""The regions of a batch in a view of it: boxes moved with their pixels, and those that are of no use dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from locfast.data.geometry import carry
from locfast.data.spec import Geometry, Record, Region

REASONS = ("not finite", "swapped", "empty", "no text", "outside", "left the view", "tiny")
"""Why a region is dropped. It counts once, under the first that holds."""
ROUNDING = 1e-6
"""A geometry's fp32 corners may cut so small a share off a box that ends where its view does."""


@dataclass(frozen=True)
class ViewRegions:
    """The regions of a batch that are in sight in a view, in tensors on the CPU; R is the largest count, at least 1."""

    boxes: Tensor  # [B, R, 4] fp32: left, top, right, bottom in [0, 1] of the padded view; 0 where there is none
    which: Tensor  # [B, R] int64: place in `record.regions`, -1 where there is none
    count: Tensor  # [B] int64: regions of each sample; they stand first, in the order of the source
    dropped: dict[str, int]  # regions left out, by every one of REASONS


def regions_in_view(
    records: Sequence[Record], geometry: Geometry, *, min_shown: float = 0.5, min_side: float = 1.0
) -> ViewRegions:
    """Carry the regions of `records` (a batch's) into the view that `geometry` describes.

    A region is dropped, and counted under the first of these that holds:

    - "not finite": a corner is NaN or infinite;
    - "swapped": its right lies left of its left, or its bottom above its top;
    - "empty": it has no area;
    - "no text": its text is blank;
    - "outside": no part of it lies in the image;
    - "left the view": cut to the image, less than `min_shown` of its area is in the view;
    - "tiny": what is in the view is under `min_side` view pixels wide or high.

    The others are cut to what the view shows of the image. Raises ValueError for records of another batch.
    """
    if len(records) != len(geometry.box):
        raise ValueError(f"{len(records)} records do not belong to views of {len(geometry.box)} samples")
    regions = [record.regions or () for record in records]
    lengths = torch.tensor([len(each) for each in regions], dtype=torch.int64)
    flat = list(chain.from_iterable(regions))
    rows = torch.repeat_interleave(torch.arange(len(records)), lengths)
    place = torch.arange(len(flat)) - (lengths.cumsum(0) - lengths)[rows]
    boxes, fault = _cut(flat, geometry.source_size[rows])
    carried, share = carry(geometry, rows, boxes)
    sides = carried[:, 2:] - carried[:, :2]
    late = {"left the view": (share <= 0) | (share < min_shown - ROUNDING), "tiny": (sides < min_side).any(-1)}
    for reason, holds in late.items():
        fault = torch.where((fault < 0) & holds, REASONS.index(reason), fault)

    kept = fault < 0
    numbers = torch.bincount(fault[~kept], minlength=len(REASONS)).tolist()
    count = torch.bincount(rows[kept], minlength=len(records))
    most = max(1, int(count.max()) if len(records) else 0)
    row, slot = rows[kept], torch.arange(int(kept.sum())) - (count.cumsum(0) - count)[rows[kept]]
    frame = torch.tensor([geometry.size[1], geometry.size[0]] * 2, dtype=torch.float64)
    in_view, which = torch.zeros(len(records), most, 4), torch.full((len(records), most), -1)
    in_view[row, slot] = (carried[kept] / frame).float()
    which[row, slot] = place[kept]
    return ViewRegions(in_view, which, count, dict(zip(REASONS, numbers, strict=True)))


def _cut(regions: Sequence[Region], sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [K, 4] fp64 cut to their images of `sizes` [K, 2], and the number of the reason that drops each, or -1."""
    numbers = chain.from_iterable(region.box for region in regions)
    boxes = torch.from_numpy(np.fromiter(numbers, np.float64, 4 * len(regions))).view(-1, 2, 2)
    blank = torch.tensor([not region.text or region.text.isspace() for region in regions], dtype=torch.bool)
    sides = boxes[:, 1] - boxes[:, 0]
    cut = boxes.clamp(torch.zeros(1, 1, 2, dtype=torch.float64), sizes.flip(-1)[:, None].double())
    faults = {
        "not finite": ~boxes.isfinite().all(-1).all(-1),
        "swapped": (sides < 0).any(-1),
        "empty": (sides == 0).any(-1),
        "no text": blank,
        "outside": (cut[:, 1] <= cut[:, 0]).any(-1),
    }
    fault = torch.full((len(regions),), -1)
    for reason, holds in reversed(faults.items()):
        fault = torch.where(holds, REASONS.index(reason), fault)
    return cut.flatten(1), fault
