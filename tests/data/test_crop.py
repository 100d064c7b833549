"""Crops: timm's transforms, drawn from keyed numbers."""

import io
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio, center_crop_or_pad
from timm.data.transforms_factory import transforms_imagenet_eval

from locfast.data.crop import draw_numbers, plan
from locfast.data.decode.cpu import CpuDecoder
from locfast.data.spec import View
from locfast.random import Keys

HALF = (0.5, 0.5, 0.5)
SIZES = [(500, 375), (333, 500), (97, 1000), (1000, 97), (40, 31), (224, 224), (1, 1), (3, 900)]


def view(**options) -> View:
    return replace(View((224, 224), HALF, HALF), **options)


def render(data: bytes, wanted: View, numbers: list[float]) -> np.ndarray:
    image = CpuDecoder().open(data)
    return image.render([plan(wanted, image.size, numbers)])[0]


def numbers_for(wanted: View, count: int, seed: int = 0) -> list[list[float]]:
    return draw_numbers(wanted, "image", Keys(seed, torch.zeros(count).long(), torch.arange(count))).tolist()


def assert_same_pixels(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal up to rounding: filter taps of a resized part and of a part of a resize differ in the last bit, twice.

    A tenth of a pixel of shift would be 0.3 levels on average in these pictures.
    """
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.15


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("side", "crop_pct", "mode"),
    [
        ((224, 224), 0.9, "center"),
        ((224, 224), 1.0, "center"),
        ((112, 160), 0.875, "center"),
        ((96, 96), 0.9, "squash"),
    ],
)
def test_evaluation_views_equal_timms(picture, encode, size, side, crop_pct, mode):
    image = picture(*size)
    theirs = transforms_imagenet_eval(side, crop_pct, mode, interpolation="bicubic", use_prefetcher=True)(image)
    ours = render(encode(image, "PNG"), view(size=side, crop_pct=crop_pct, crop=mode), [0.9, 0.9])
    assert_same_pixels(ours, theirs.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_evaluation_views_have_the_interpolation_that_a_timm_config_names(picture, encode, interpolation):
    image = picture(333, 500)
    theirs = transforms_imagenet_eval(96, 0.9, interpolation=interpolation, use_prefetcher=True)(image)
    wanted = view(size=(96, 96), crop_pct=0.9, interpolation=interpolation)
    ours = render(encode(image, "PNG"), wanted, [0.9, 0.9]).astype(int)
    # nearest and box decide by a pixel's edge, which lies a rounding to either side
    difference = abs(ours - theirs.permute(1, 2, 0).numpy())
    assert difference.mean() < (1.0 if interpolation in ("nearest", "box") else 0.15)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"interpolation": "cubic-ish"}, "got 'cubic-ish'"),
        ({"crop": "simple"}, "got 'simple'"),
        ({"scale": (0.0, 1.0)}, r"got \(0.0, 1.0\)"),
        ({"scale": (0.5, 0.2)}, "low <= high"),
        ({"scale": (0.2, 1.5)}, "<= 1"),
        ({"crop": "simple_resized", "size": (64, 8)}, "pads by 4 pixels"),
    ],
)
def test_a_view_that_cannot_be_made_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        view(**options)


def test_a_zoom_keeps_to_the_scale_of_its_view():
    wanted = view(crop="zoom_center", scale=(0.5, 0.6))
    plans = [plan(wanted, (400, 400), numbers) for numbers in numbers_for(wanted, 400)]
    shares = np.array([(p.resized[0] * p.resized[1]) ** 0.5 / 224 for p in plans])
    zoomed = shares[shares > 1.01]
    # sides are whole pixels of some 300, and an aspect that changes keeps the area
    assert 0.4 < len(zoomed) / 400 < 0.6
    assert zoomed.min() > 0.6**-0.5 - 0.01 and zoomed.max() < 0.5**-0.5 + 0.01


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (97, 200), (40, 31), (224, 224), (1, 1), (3, 90)])
@pytest.mark.parametrize("top", [0, 3, 4, 6, 8])
@pytest.mark.parametrize("left", [0, 4, 8])
def test_a_simple_resized_view_equals_torchvisions_for_the_same_offsets(picture, encode, monkeypatch, size, top, left):
    """Offsets in the padded picture; at the far end where the long side has room for more."""
    from torchvision.transforms import InterpolationMode, RandomCrop, Resize

    image = picture(*size)
    resized = Resize(64, InterpolationMode.BICUBIC)(image)
    room = (resized.height - 64 + 8, resized.width - 64 + 8)
    offsets = [most if offset == 8 else offset for offset, most in zip((top, left), room, strict=True)]
    monkeypatch.setattr(RandomCrop, "get_params", staticmethod(lambda *_: (*offsets, 64, 64)))
    theirs = RandomCrop(64, padding=4, padding_mode="reflect")(resized).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    numbers = [0.1, 0.9, *((offset + 0.5) / (most + 1) for offset, most in zip(offsets, room, strict=True))]
    wanted = view(size=(64, 64), crop="simple_resized", flip=True)
    assert_same_pixels(render(encode(image, "PNG"), wanted, numbers), np.asarray(theirs))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [(224, 224), (112, 161), (33, 20)])
@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
def test_a_padded_view_is_the_image_in_the_middle_of_the_mean_colour(picture, encode, size, side, interpolation):
    """As tf.image.resize_with_pad computes sizes: the image's by the larger of both ratios, rounded down."""
    image = picture(*size)
    ratio = max(Fraction(size[0], side[1]), Fraction(size[1], side[0]))
    resized = image.resize([max(1, int(length / ratio)) for length in size], Image.Resampling[interpolation.upper()])
    page = Image.new("RGB", side[::-1], (102, 51, 184))
    page.paste(resized, ((side[1] - resized.width) // 2, (side[0] - resized.height) // 2))
    wanted = replace(view(size=side, crop="pad", interpolation=interpolation, flip=True), mean=(0.4, 0.2, 0.72))
    data = encode(image, "PNG")
    assert_same_pixels(render(data, wanted, [0.9, 0.9]), np.asarray(page))
    flipped = render(data, wanted, [0.1, 0.9])
    assert_same_pixels(flipped, np.asarray(page.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))


def test_a_padded_view_keeps_the_aspect_of_its_image():
    """To a pixel of the shorter side, over images of all shapes and views of three."""
    for side in ((224, 224), (96, 130), (130, 96)):
        for height, width in np.random.default_rng(0).integers(1, 2000, (300, 2)).tolist():
            x0, y0, x1, y1 = plan(view(size=side, crop="pad"), (height, width), [0.0, 0.0]).inside
            assert (x0, x1) == (0, side[1]) or (y0, y1) == (0, side[0])
            scale = min(side[0] / height, side[1] / width)
            assert -1e-9 <= width * scale - (x1 - x0) < 1 or x1 - x0 == 1
            assert -1e-9 <= height * scale - (y1 - y0) < 1 or y1 - y0 == 1
            assert 0 <= side[1] - x1 - x0 <= 1 and 0 <= side[0] - y1 - y0 <= 1


def test_every_offset_of_a_simple_resized_view_is_as_likely():
    """On a square: 0 to 8 each way, of 9000 draws 1000 each; 4.5 standard deviations are 134."""
    wanted = view(size=(64, 64), crop="simple_resized", flip=True)
    plans = [plan(wanted, (128, 128), numbers) for numbers in numbers_for(wanted, 9000)]
    for axis in (0, 1):
        shifts = [p.inside[axis] - (64 - p.inside[axis + 2]) for p in plans]  # 4 .. -4: padding before, less behind
        counts = np.bincount(np.array(shifts) + 4, minlength=9)
        assert len(counts) == 9 and np.abs(counts - 1000).max() < 134
    assert np.mean([p.flip for p in plans]) == pytest.approx(0.5, abs=0.02)
    wide = [plan(wanted, (128, 256), numbers).box for numbers in numbers_for(wanted, 2000)]
    assert min(box[0] for box in wide) == 0 and max(box[2] for box in wide) == 256
    assert {round(box[0]) for box in wide} == set(range(0, 137, 2))  # 64 px of room and the padding behind it


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (97, 200), (40, 31), (1, 1), (3, 90)])
@pytest.mark.parametrize(
    "numbers",
    [  # flip, interpolation, zoom?, area, aspect?, ratio: half of the outcomes each, and both ends
        (0.9, 0.2, 0.9, 0.0, 0.9, 0.0),
        (0.9, 0.7, 0.1, 0.0, 0.9, 0.0),
        (0.1, 0.2, 0.1, 0.6, 0.1, 0.0),
        (0.9, 0.7, 0.9, 0.0, 0.1, 1.0),
    ],
)
def test_a_zoomed_view_equals_timms_for_the_same_numbers(picture, encode, monkeypatch, size, numbers):
    """timm draws: zoom?, area if so, aspect?, ratio if so, which interpolation."""
    flip, interpolation, zoom, area, aspect, ratio = numbers
    drawn = [zoom, *([area] if zoom < 0.5 else []), aspect, *([ratio] if aspect < 0.5 else [])]
    monkeypatch.setattr(random, "random", lambda: drawn.pop(0))
    monkeypatch.setattr(random, "uniform", lambda a, b: a + (b - a) * drawn.pop(0))
    monkeypatch.setattr(random, "choice", lambda options: options[interpolation >= 0.5])
    image = picture(*size)
    resize = ResizeKeepRatio((64, 64), 0.0, "random", 0.5, (0.08, 1.0), True, 0.5, (3 / 4, 4 / 3))
    theirs = center_crop_or_pad(resize(image), (64, 64), padding_mode="reflect")
    theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else theirs
    wanted = view(size=(64, 64), crop="zoom_center", interpolation="random", flip=True)
    assert_same_pixels(render(encode(image, "PNG"), wanted, list(numbers)), np.asarray(theirs))


def test_zoomed_views_have_the_geometry_that_timms_have():
    """Sizes before the crop, over 4000 draws of each: quantiles agree to sampling error (3 % at this number)."""
    wanted = view(crop="zoom_center")
    resize = ResizeKeepRatio((224, 224), 0.0, "bilinear", 0.5, (0.08, 1.0), True, 0.5, (3 / 4, 4 / 3))
    image = Image.new("RGB", (500, 375))
    random.seed(0)
    sizes = [
        resize.get_params(image, (224, 224), 0.0, 0.5, (0.08, 1.0), True, 0.5, (3 / 4, 4 / 3)) for _ in range(4000)
    ]
    theirs = np.array([(min(1, 224 / h), min(1, 224 / w), min(h, w) < 224) for h, w in sizes])
    plans = [plan(wanted, (375, 500), numbers) for numbers in numbers_for(wanted, 4000)]
    ours = np.array(
        [((p.box[3] - p.box[1]) / 375, (p.box[2] - p.box[0]) / 500, p.inside != (0, 0, 224, 224)) for p in plans]
    )
    visible = [rows[:, 0] * rows[:, 1] for rows in (ours, theirs)]
    # On a picture of 500 x 375 the public reference shows 57 % of it on average, and pads 14.5 % of the samples.
    for ours_or_theirs, rows in zip(visible, (ours, theirs), strict=True):
        assert ours_or_theirs.mean() == pytest.approx(0.57, abs=0.02)
        assert rows[:, 2].mean() == pytest.approx(0.145, abs=0.02)
    shares = np.linspace(0.05, 0.95, 19)
    for one, other in (visible, (ours[:, 0], theirs[:, 0]), (ours[:, 1], theirs[:, 1])):
        assert np.abs(np.quantile(one, shares) - np.quantile(other, shares)).max() < 0.03


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.5, 0.6)])
def test_random_resized_crops_have_the_geometry_that_timms_have(scale):
    wanted = view(crop="random_resized", scale=scale)
    image = Image.new("RGB", (500, 375))
    random.seed(0)
    params = (RandomResizedCropAndInterpolation.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000))
    theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in params])
    ours = np.array([plan(wanted, (375, 500), numbers).box for numbers in numbers_for(wanted, 4000)])
    assert (ours == ours.round()).all()
    shares = np.linspace(0.05, 0.95, 19)
    for side, length in enumerate((500, 375, 500, 375)):
        difference = np.quantile(ours[:, side], shares) - np.quantile(theirs[:, side], shares)
        assert np.abs(difference).max() < 0.03 * length


@pytest.mark.parametrize("crop", ["center", "zoom_center", "random_resized", "simple_resized", "squash", "pad"])
@pytest.mark.parametrize("size", [(120, 90), (97, 1000), (40, 31), (1, 1), (3, 900), (900, 2)])
def test_every_policy_fills_the_view_for_every_size_of_image(picture, encode, crop, size):
    wanted = view(size=(32, 48), crop=crop, interpolation="random", flip=True)
    data = encode(picture(*size), "PNG")
    for numbers in numbers_for(wanted, 4):
        made = plan(wanted, (size[1], size[0]), numbers)
        left, top, right, bottom = made.box
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert render(data, wanted, numbers).shape == (32, 48, 3)


def test_a_view_that_flips_does_so_half_of_the_time_and_interpolates_both_ways():
    wanted = view(crop="zoom_center", interpolation="random", flip=True)
    plans = [plan(wanted, (100, 100), numbers) for numbers in numbers_for(wanted, 2000)]
    assert np.mean([p.flip for p in plans]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([p.interpolation == "bicubic" for p in plans]) == pytest.approx(0.5, abs=0.04)
    assert not any(plan(replace(wanted, flip=False), (100, 100), n).flip for n in numbers_for(wanted, 50))


def test_two_views_of_a_sample_are_cropped_independently():
    wanted = view(crop="random_resized")
    keys = Keys.of(0, 0, 5)
    assert not np.array_equal(draw_numbers(wanted, "first", keys), draw_numbers(wanted, "second", keys))


def test_png_and_its_ppm_give_the_same_view(picture, encode):
    image = picture(80, 60)
    wanted = view(crop="zoom_center")
    numbers = numbers_for(wanted, 1)[0]
    assert np.array_equal(*(render(encode(image, kind), wanted, numbers) for kind in ("PNG", "PPM")))
    assert Image.open(io.BytesIO(encode(image, "PPM"))).size == (80, 60)
