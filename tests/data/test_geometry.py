"""Boxes and label maps follow their pixels into every view."""

import numpy as np
import pytest
import torch
from PIL import Image

from locfast.data.crop import Plan, draw_numbers, geometry, plan
from locfast.data.decode.cpu import CpuDecoder
from locfast.data.geometry import apply_to_boxes, apply_to_label_map
from locfast.data.spec import View
from locfast.random import Keys

BOX = (70, 40, 130, 90)
POLICIES = ["center", "zoom_center", "random_resized", "simple_resized", "squash", "pad"]


def marked(encode, orientation: int = 1) -> bytes:
    """A black picture of 200 x 150 with a white rectangle at BOX, stored as `orientation` says."""
    pixels = np.zeros((150, 200, 3), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    if orientation == 6:
        image = image.transpose(Image.Transpose.ROTATE_90)
    return encode(image, "PNG", exif=exif)


def plans_of(policy: str, count: int = 12) -> list[Plan]:
    view = View((96, 80), (0.5,) * 3, (0.5,) * 3, crop=policy, interpolation="bilinear", flip=True, crop_pct=0.9)
    numbers = draw_numbers(view, "image", Keys(0, torch.zeros(count).long(), torch.arange(count)))
    return [plan(view, (150, 200), row.tolist()) for row in numbers]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_box_lies_where_its_pixels_are(encode, policy, orientation):
    picture = CpuDecoder().open(marked(encode, orientation))
    plans = plans_of(policy)
    place = geometry(plans, [picture.size] * len(plans))
    seen = 0
    for row, (made, pixels) in enumerate(zip(plans, picture.render(plans), strict=True)):
        boxes, share = apply_to_boxes(place, row, torch.tensor([BOX], dtype=torch.float32))
        # Reflected copies of the rectangle lie outside of what the view shows.
        x0, y0, x1, y1 = made.inside
        if made.flip:
            x0, x1 = 80 - x1, 80 - x0
        white = np.argwhere(pixels[y0:y1, x0:x1, 0] > 127)
        if not len(white):
            assert share.item() < 0.02
            continue
        (top, left), (bottom, right) = white.min(0), white.max(0) + 1
        found = torch.tensor([left + x0, top + y0, right + x0, bottom + y0])
        assert (boxes[0] - found).abs().max() <= 1
        seen += 1
    assert seen >= 6


def test_a_box_outside_of_the_view_is_empty_and_half_a_box_is_half_seen():
    made = Plan((10, 10), (100, 0, 200, 100), (0, 0, 10, 10), False, "bilinear")
    boxes, share = apply_to_boxes(
        geometry([made], [(100, 200)]), 0, torch.tensor([[0.0, 0, 50, 50], [50, 20, 150, 40], [110, 10, 120, 20]])
    )
    assert share.tolist() == [0, 0.5, 1]
    assert boxes[1].tolist() == [0, 2, 5, 4]
    assert boxes[2].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_label_map_lies_where_its_pixels_are(encode, policy, scale):
    """Also when the map has another resolution than its picture."""
    picture = CpuDecoder().open(marked(encode))
    labels = torch.zeros(round(150 * scale), round(200 * scale), dtype=torch.uint8)
    left, top, right, bottom = (round(side * scale) for side in BOX)
    labels[top:bottom, left:right] = 1
    plans = plans_of(policy)
    place = geometry(plans, [picture.size] * len(plans))
    for row, (made, pixels) in enumerate(zip(plans, picture.render(plans), strict=True)):
        carried = apply_to_label_map(place, row, labels)
        assert carried.dtype == torch.uint8
        x0, y0, x1, y1 = made.inside
        if made.flip:
            x0, x1 = 80 - x1, 80 - x0
        shown = torch.zeros(96, 80, dtype=torch.bool)
        shown[y0:y1, x0:x1] = True
        assert torch.equal(carried == 255, ~shown)
        white = torch.from_numpy(pixels[..., 0].copy())
        # Pixels that are clearly one or the other; those on the rim are mixed.
        assert (carried[shown & (white > 250)] == 1).float().mean() > 0.99 or not (shown & (white > 250)).any()
        assert (carried[shown & (white < 5)] == 0).float().mean() > 0.99
