"""What the engine's tests share: a folder of images and unbroken runs to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

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
