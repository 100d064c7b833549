"""Which pixel of the shown part of a view stands at each place of it: reflection around the part, then the flip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from locfast.data.crop import Plan


def reflect(position: Tensor, length: Tensor) -> Tensor:
    """Fold positions (int64, any) into 0 .. length - 1 as numpy's pad mode "reflect" does: ... 2 1 0 1 2 ..."""
    period = (2 * (length - 1)).clamp(min=1)
    folded = position.remainder(period)
    return torch.where(length == 1, 0, torch.minimum(folded, period - folded))


def source_pixels(plans: Sequence[Plan], axis: int) -> Tensor:
    """For each plan and each pixel of its view along `axis` (0: y, 1: x): the pixel of the shown part, [B, h or w]."""
    size = plans[0].size[axis]
    starts = torch.tensor([plan.inside[1 - axis] for plan in plans])[:, None]
    ends = torch.tensor([plan.inside[3 - axis] for plan in plans])[:, None]
    position = torch.arange(size).expand(len(plans), size)
    if axis == 1:
        flips = torch.tensor([plan.flip for plan in plans])[:, None]
        position = torch.where(flips, size - 1 - position, position)
    return reflect(position - starts, ends - starts)


def is_reflected(plan: Plan) -> bool:
    """Whether the view shows no image somewhere, and reflects it into there."""
    height, width = plan.size
    return plan.border is None and plan.inside != (0, 0, width, height)


def fill(views: Tensor, plans: Sequence[Plan]) -> Tensor:
    """Views [B, 3, h, w] whose shown part lies at their top left, unflipped, where `plans` want it: one gather.

    Rows that reflect nothing are taken as they are, flipped or not.
    """
    rows = [i for i, plan in enumerate(plans) if is_reflected(plan)]
    if not rows:
        return views
    chosen = [plans[i] for i in rows]
    y, x = (source_pixels(chosen, axis).to(views.device, non_blocking=True) for axis in (0, 1))
    place = torch.tensor(rows).to(views.device, non_blocking=True)
    part = views[place]
    part = part.gather(2, y[:, None, :, None].expand_as(part)).gather(3, x[:, None, None, :].expand_as(part))
    return views.index_copy(0, place, part)
