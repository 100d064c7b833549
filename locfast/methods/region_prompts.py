"""Which regions of a batch a step asks about: drawn on the host, laid out so that no prompt is computed in vain."""

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
    """P prompts on S of B images, at most M an image, in M rounds of one prompt an image.

    A batch without any region has one prompt all the same, which does not count: so every weight takes part.
    """

    images: Tensor  # [S] int64: which images of the batch have regions
    rows: tuple[Tensor | None, ...]  # by round: which of those S are asked; None: all
    boxes: tuple[Tensor, ...]  # by round: [., 4] in [0, 1] of the frame
    slots: Tensor  # [P] int64: image of the batch x M + round, in the order of the rounds
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
        images = [image for image, own in enumerate(chosen) if own]
        rounds = [[(i, chosen[image][m]) for i, image in enumerate(images) if len(chosen[image]) > m]
                  for m in range(max(map(len, chosen), default=0))]  # fmt: skip
        if not images:
            images, rounds = [0], [[(0, -1)]]
        kept, texts = len(rounds[0]) if rounds[0][0][1] >= 0 else 0, dict[str, int]()
        rows, boxes, slots, phrase_of = [], [], [], []
        for m, asked in enumerate(rounds):
            which = [i for i, _ in asked]
            rows.append(None if len(which) == len(images) else upload(torch.tensor(which)))
            at = torch.tensor([[images[i], max(place, 0)] for i, place in asked])
            boxes.append(upload(found.boxes[at[:, 0], at[:, 1]] if kept else torch.tensor([[0.0, 0.0, 1.0, 1.0]])))
            slots += [images[i] * places.shape[1] + m for i in which]
            for i, place in asked:
                regions = records[images[i]].regions
                text = regions[int(found.which[images[i], place])].text if place >= 0 and regions else ""
                phrase_of.append(texts.setdefault(text, len(texts)))
        valid = torch.zeros(places.numel(), dtype=torch.bool)
        valid[slots] = bool(kept)
        return RegionPrompts(
            images=upload(torch.tensor(images)),
            rows=tuple(rows),
            boxes=tuple(boxes),
            slots=upload(torch.tensor(slots)),
            phrases=list(texts),
            phrase_of=upload(torch.tensor(phrase_of)),
            valid=upload(valid),
            counts=(len(records), kept, len(slots) if kept else 0),
            dropped=found.dropped,
        )


def _some(count: int, places: Sequence[float]) -> list[int]:
    """As many of 0 .. count - 1 as there are places, or all of them: each equally likely, in a random order."""
    left = list(range(count))
    return [left.pop(int(place * len(left))) for place in places[:count]]
