"""Which regions of a batch a step asks about: drawn on the host, so that no prompt is computed in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from locfast.data.regions.in_view import regions_in_view
from locfast.data.spec import Geometry, Record

Upload = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RegionPrompts:
    """P prompts on S of B images, at most M an image, image by image.

    A batch without any region has one prompt all the same, which does not count: so every weight takes part.
    """

    images: Tensor  # [S] int64: which images of the batch have regions
    rows: Tensor  # [P] int64: which of those S a prompt asks about
    boxes: Tensor  # [P, 4] in [0, 1] of the frame
    slots: Tensor  # [P] int64: image of the batch x M + the number of the prompt
    phrases: list[str]  # [U] distinct texts
    phrase_of: Tensor  # [P] int64: the text of a prompt
    valid: Tensor  # [B * M] bool: whether a slot holds a region
    counts: tuple[int, int, int]  # images, those with regions, regions
    dropped: dict[str, int]  # of the images' regions, by reason

    @staticmethod
    def of(
        records: Sequence[Record],
        geometry: Geometry,
        places: Tensor,
        upload: Upload,
        *,
        min_shown: float,
        min_side: float,
    ) -> RegionPrompts:
        """places [B, M] in [0, 1), on the CPU, choose M of an image's regions that a view shows, none twice."""
        found = regions_in_view(records, geometry, min_shown=min_shown, min_side=min_side)
        chosen = [_some(count, own) for count, own in zip(found.count.tolist(), places.tolist(), strict=True)]
        asked = [(image, place) for image, own in enumerate(chosen) for place in own]
        counts = (len(records), sum(map(bool, chosen)), len(asked))
        texts = [_text(records[image], int(found.which[image, place])) for image, place in asked]
        image, place = torch.tensor(asked or [(0, 0)]).unbind(1)
        images, rows, of_image = image.unique_consecutive(return_inverse=True, return_counts=True)
        number = torch.arange(len(image)) - (of_image.cumsum(0) - of_image)[rows]
        slots = image * places.shape[1] + number
        valid = torch.zeros(places.numel(), dtype=torch.bool)
        valid[slots] = bool(asked)
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts or [""]))}
        return RegionPrompts(
            images=upload(images),
            rows=upload(rows),
            boxes=upload(found.boxes[image, place] if asked else torch.tensor([[0.0, 0.0, 1.0, 1.0]])),
            slots=upload(slots),
            phrases=list(distinct),
            phrase_of=upload(torch.tensor([distinct[text] for text in texts or [""]])),
            valid=upload(valid),
            counts=counts,
            dropped=found.dropped,
        )


def _text(record: Record, which: int) -> str:
    assert record.regions is not None
    return record.regions[which].text


def _some(count: int, places: Sequence[float]) -> list[int]:
    """As many of 0 .. count - 1 as there are places, or all of them: each equally likely, in a random order."""
    left = list(range(count))
    return [left.pop(int(place * len(left))) for place in places[:count]]
