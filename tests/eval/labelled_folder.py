"""A small labelled folder whose images tell their classes."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("sky", "wall", "floor")


def write_data(root: Path, seed: int = 0, train: int = 24, validation: int = 10) -> Path:
    """Photograph-like noise whose colour follows its class, in blocks of 16 of 64 x 48 pixels."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", validation)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            ids = generator.integers(0, 3, (3, 4), np.uint8).repeat(16, 0).repeat(16, 1)
            image = 60 * ids[..., None] + generator.integers(0, 60, (48, 64, 3), np.uint8)
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{split}{i}.jpg", quality=95)
            Image.fromarray(ids).save(root / "annotations" / split / f"{split}{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root
