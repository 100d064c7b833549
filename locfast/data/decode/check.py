"""A test that a decoder has to pass before it is chosen without being asked for."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from locfast.data.crop import draw_numbers, plan
from locfast.data.decode.cpu import CpuDecoder
from locfast.data.decode.device import DeviceDecoder, Encoded, constants, normalise
from locfast.data.spec import ImageSpec
from locfast.random import Keys

LIMIT = 1.5
"""Largest mean difference of a view, in levels of 255. By so much bilinear and bicubic resizing of a photograph differ
(1.6 over twenty of them, tests/data/test_decoders.py); a view one pixel beside its place is 2.8 off in these pictures
and 9.5 in photographs."""


def trial_images() -> list[bytes]:
    """Smooth noise as a JPEG of each kind that device decoders are given: turned, grey, progressive, 4:4:4."""
    knots = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(knots).resize((288, 224), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"exif": turned},
        {"progressive": True},
        {"subsampling": 0},
        {"grey": True},
    )
    encoded = []
    for kind in kinds:
        file = io.BytesIO()
        (image.convert("L") if kind.pop("grey", False) else image).save(file, "JPEG", quality=90, **kind)
        encoded.append(file.getvalue())
    return encoded


def difference(decoder: DeviceDecoder, spec: ImageSpec) -> str | None:
    """How the decoder's views of the trial images differ from the CPU decoder's; None where they agree."""
    images, expected, files = [], [], trial_images()
    keys = Keys(0, torch.zeros(len(files), dtype=torch.int64), torch.arange(len(files)))
    numbers = {name: draw_numbers(view, name, keys).tolist() for name, view in spec.views.items()}
    for i, data in enumerate(files):
        picture = CpuDecoder().open(data)
        plans = {name: plan(view, picture.size, numbers[name][i]) for name, view in spec.views.items()}
        images.append(Encoded(torch.frombuffer(bytearray(data), dtype=torch.uint8), picture.size, picture.turn, plans))
        expected.append(picture.render(list(plans.values())))
    decoder.begin(images)
    views = decoder.end()
    on_cpu = constants(spec, torch.device("cpu"))
    for place, name in enumerate(spec.views):
        pixels = torch.stack([torch.from_numpy(each[place].copy()) for each in expected])
        wanted = normalise(pixels.permute(0, 3, 1, 2).float(), *on_cpu[name])
        levels = ((views[name].cpu() - wanted) * on_cpu[name][2] * 255).abs().mean((1, 2, 3))
        if not bool((levels <= LIMIT).all()):
            return f"view {name} of trial image {int(levels.argmax())} is {levels.max():.1f} levels off the CPU's"

    return None
