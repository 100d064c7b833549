"""Resampling: cutting, resizing and reflecting pixels as PIL, torchvision and numpy do."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as torchvision

from locfast.data.crop import Plan
from locfast.data.decode.cpu import CpuDecoder
from locfast.data.decode.filters import resample
from locfast.data.decode.reflect import fill


@pytest.mark.parametrize("size", [(40, 30), (7, 5), (1, 1), (200, 3)])
def test_the_gather_reflects_and_flips_as_numpy_does(size):
    pixels = torch.randint(0, 256, (2, 3, *size[::-1])).float()
    shown = [
        Plan((64, 208), (0, 0, 1, 1), (3, 20, 3 + size[0], 20 + size[1]), flip, "bicubic") for flip in (False, True)
    ]
    views = torch.full((2, 3, 64, 208), torch.nan)
    views[:, :, : size[1], : size[0]] = pixels
    margins = ((0, 0), (20, 64 - 20 - size[1]), (3, 208 - 3 - size[0]))
    padded = [np.pad(each, margins, mode="reflect") for each in pixels.numpy()]
    filled = fill(views, shown).numpy()
    assert np.array_equal(filled[0], padded[0])
    assert np.array_equal(filled[1], padded[1][..., ::-1])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("side", [20, 100, 400])
def test_filters_as_matrices_equal_pils(picture, interpolation, side):
    image = picture(150, 130)
    theirs = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling[interpolation.upper()])))
    made = Plan((side, side), (0, 0, 150, 130), (0, 0, side, side), False, interpolation, (side, side))
    ours = resample(torchvision.pil_to_tensor(image), made)
    off = (ours.permute(1, 2, 0) - theirs).abs()
    # PIL's weights have 22 bits and its sums are rounded twice, so a tie may fall to the other side twice
    assert off.max() <= 2
    assert off.mean() < 0.05


def test_a_random_resized_crop_equals_torchvisions(picture, encode):
    """Cut out first, then resized: the filter sees nothing around the box."""
    image = picture(150, 130)
    made = Plan((64, 64), (20, 31, 97, 101), (0, 0, 64, 64), False, "bicubic")
    around = Plan((64, 64), (20, 31, 97, 101), (0, 0, 64, 64), False, "bicubic", (119, 125))
    theirs = np.asarray(torchvision.resized_crop(image, 31, 20, 70, 77, [64, 64], 3)).astype(int)
    data = encode(image, "PNG")
    off = [np.abs(CpuDecoder().open(data).render([each])[0] - theirs) for each in (made, around)]
    assert off[0].max() <= 2
    assert off[0].mean() < 0.15
    assert off[1][0].mean() > 2 * off[0][0].mean()  # the first row, where seeing around makes the difference
