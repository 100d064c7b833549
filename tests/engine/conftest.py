"""What the engine's tests share: a folder of images and unbroken runs to compare with."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.engine.toy import ToyConfig, losses, make_images, toy_config


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


SETTINGS = {"steps": 24, "save_every": 4, "ema": 0.9, "seed": 3, "toy": ToyConfig(dropout=0.1)}
"""Of the runs that are killed, torn and resumed: dropout and averaging on, so that their state counts."""


@pytest.fixture(scope="session")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss curve of a run with SETTINGS that nothing disturbed."""
    from locfast.engine.run import train

    return losses(train(toy_config(images, tmp_path_factory.mktemp("unbroken") / "run", **SETTINGS)))


@pytest.fixture(scope="session")
def jpeg_of() -> Callable[[int, int], bytes]:
    """The bytes of a JPEG file of smooth colours, by width and height."""

    def encoded(width: int, height: int) -> bytes:
        file = io.BytesIO()
        coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(file, "JPEG", quality=95)
        return file.getvalue()

    return encoded
