"""The regions of a batch in a view: as one by one with `apply_to_boxes`, and by one rule for what is dropped."""

import math
import time

import numpy as np
import pytest
import torch

from locfast.data.crop import Plan, draw_numbers, geometry, plan
from locfast.data.geometry import apply_to_boxes
from locfast.data.regions.in_view import REASONS, regions_in_view
from locfast.data.spec import Geometry, Record, Region, View
from locfast.random import Keys

POLICIES = ["center", "zoom_center", "random_resized", "simple_resized", "squash", "pad"]
WHOLE = Plan((100, 200), (0, 0, 400, 200), (0, 0, 200, 100), False, "bilinear")
"""An image of 400 x 200 shown whole at half its size."""


def of(*boxes: tuple[float, float, float, float], text: str = "a thing") -> Record:
    return Record(b"", regions=tuple(Region(box, text) for box in boxes))


def drawn(policy: str, count: int) -> tuple[Geometry, list[Record]]:
    """Views of images of all sizes, with boxes inside, outside and across the rim, some of them degenerate."""
    view = View((96, 80), (0.5,) * 3, (0.5,) * 3, crop=policy, flip=True, crop_pct=0.9)
    numbers = draw_numbers(view, "image", Keys(0, torch.zeros(count).long(), torch.arange(count)))
    random = np.random.default_rng(POLICIES.index(policy))
    sizes = [tuple(random.integers(20, 400, 2).tolist()) for _ in range(count)]
    records = []
    for height, width in sizes:
        corners = random.uniform(-0.2, 1.2, (random.integers(0, 9), 2, 2)) * (width, height)
        boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
        for box in boxes:
            if random.uniform() < 0.2:
                box[random.integers(4)] = random.choice([math.nan, math.inf, -math.inf, -5, 10])
            if random.uniform() < 0.1:
                box[2] = box[0]
        texts = random.choice(["a kite", " ", ""], len(boxes), p=(0.8, 0.1, 0.1)).tolist()
        regions = tuple(Region(tuple(box), text) for box, text in zip(boxes.tolist(), texts, strict=True))
        records.append(Record(b"", regions=regions if regions or random.uniform() < 0.5 else None))
    return geometry([plan(view, size, row.tolist()) for size, row in zip(sizes, numbers, strict=True)], sizes), records


def reason(place: Geometry, row: int, region: Region, min_shown: float, min_side: float) -> str | None:
    """The rule as the documentation has it, for one region; None: it stays."""
    left, top, right, bottom = region.box
    height, width = place.source_size[row].tolist()
    if not all(map(math.isfinite, region.box)):
        return "not finite"
    if right < left or bottom < top:
        return "swapped"
    if right == left or bottom == top:
        return "empty"
    if not region.text.strip():
        return "no text"
    cut = [max(left, 0), max(top, 0), min(right, width), min(bottom, height)]
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        return "outside"
    (x0, y0, x1, y1), share = (part[0].tolist() for part in apply_to_boxes(place, row, torch.tensor([cut])))
    if share == 0 or share < min_shown - 1e-6:
        return "left the view"
    return "tiny" if min(x1 - x0, y1 - y0) < min_side else None


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("min_shown", "min_side"), [(0.5, 1.0), (0.9, 8.0), (0.0, 0.0)])
def test_a_batch_of_regions_is_carried_as_one_by_one(policy, min_shown, min_side):
    place, records = drawn(policy, 200)
    found = regions_in_view(records, place, min_shown=min_shown, min_side=min_side)
    dropped, most = dict.fromkeys(REASONS, 0), 1
    for row, record in enumerate(records):
        kept = []
        for number, region in enumerate(record.regions or ()):
            why = reason(place, row, region, min_shown, min_side)
            if why:
                dropped[why] += 1
            else:
                kept.append(number)
        assert found.count[row] == len(kept)
        assert found.which[row].tolist() == kept + [-1] * (found.which.shape[1] - len(kept))
        boxes = torch.tensor([record.regions[number].box for number in kept]).view(-1, 4)
        carried, _ = apply_to_boxes(place, row, boxes)
        # a coordinate of a few hundred pixels in fp32 is 3e-5 off
        assert torch.allclose(found.boxes[row, : len(kept)], carried / torch.tensor([80, 96, 80, 96]), atol=1e-5)
        assert not found.boxes[row, len(kept) :].any()
        most = max(most, len(kept))
    assert found.dropped == dropped and sum(dropped.values()) > 100
    assert found.boxes.shape == (200, most, 4) and found.boxes.dtype == torch.float32
    assert found.which.dtype == found.count.dtype == torch.int64
    assert found.boxes.min() >= 0 and found.boxes.max() <= 1


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ((math.nan, 0, 10, 10), "not finite"),
        ((0, 0, math.inf, 10), "not finite"),
        ((math.nan, 30, 10, 10), "not finite"),  # and swapped: the first reason counts
        ((30, 10, 10, 20), "swapped"),
        ((10, 20, 30, 10), "swapped"),
        ((10, 10, 10, 20), "empty"),
        ((500, 500, 500, 500), "empty"),
        ((400, 0, 500, 100), "outside"),  # its left side is the image's right one
        ((-100, 0, 0, 100), "outside"),
        ((10, 10, 11.9, 20), "tiny"),
        ((-1e308, -1e308, 1e308, 1e308), None),
        ((398, 198, 900, 900), None),
    ],
)
def test_a_region_is_dropped_for_one_reason(box, why):
    found = regions_in_view([of(box, (0, 0, 400, 200))], geometry([WHOLE], [(200, 400)]))
    assert found.dropped == dict.fromkeys(REASONS, 0) | ({why: 1} if why else {})
    assert found.which[0].tolist() == ([1] if why else [0, 1])


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_a_region_without_words_is_dropped(text):
    found = regions_in_view([of((10, 10, 90, 90), text=text)], geometry([WHOLE], [(200, 400)]))
    assert found.dropped["no text"] == 1 and found.count.tolist() == [0]


def test_what_is_shown_is_measured_against_the_box_cut_to_its_image():
    """A box of which a quarter lies in the image, all of that in the view; one of which the view shows 0.4."""
    right_half = Plan((100, 100), (200, 0, 400, 200), (0, 0, 100, 100), False, "bilinear")
    place, record = geometry([right_half], [(200, 400)]), of((300, 100, 500, 300), (140, 0, 240, 100))
    found = regions_in_view([record], place)
    assert found.which.tolist() == [[0]] and found.dropped["left the view"] == 1
    assert found.boxes.tolist() == [[[0.5, 0.5, 1.0, 1.0]]]
    lenient = regions_in_view([record], place, min_shown=0.4)
    assert lenient.which.tolist() == [[0, 1]] and lenient.boxes[0, 1].tolist() == pytest.approx([0, 0, 0.2, 0.5])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_box_that_the_view_just_holds_is_not_lost_to_rounding(policy):
    place, _ = drawn(policy, 200)
    records = [of(tuple(box)) for box in place.box.double().tolist()]
    found = regions_in_view(records, place, min_shown=1.0)
    assert found.count.tolist() == [1] * 200


def test_a_batch_without_regions_has_one_empty_place():
    found = regions_in_view([Record(b""), Record(b"", regions=())], geometry([WHOLE] * 2, [(200, 400)] * 2))
    assert found.which.tolist() == [[-1], [-1]] and found.count.tolist() == [0, 0]
    assert found.boxes.shape == (2, 1, 4) and not any(found.dropped.values())


def test_records_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="1 records do not belong to views of 2 samples"):
        regions_in_view([Record(b"")], geometry([WHOLE] * 2, [(200, 400)] * 2))


def test_a_large_batch_takes_no_time_to_speak_of():
    """4096 images with 12 regions took 40 ms of a core; a loop over images with tensor operations takes a second."""
    place = geometry([WHOLE] * 4096, [(200, 400)] * 4096)
    corners = np.random.default_rng(0).uniform(0, 100, (4096, 12, 2, 2)).cumsum(2).reshape(4096, 12, 4)
    records = [of(*map(tuple, boxes)) for boxes in corners.tolist()]
    spent = []
    for _ in range(5):
        start = time.process_time()
        regions_in_view(records, place)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.1
