"""Tiny models and NLTK data made once, sources of real JPEG files, and the commands as a user types them."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.vesl import tiny_models

PHOTOS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "photos"
CAPTIONS = (
    ["A photo of a red dog. The old man holds two apples."],
    ["the big cat sees a blue ball.", "a table and a red sofa"],
    [],
    ["He sees it."],
    ["a dog and a cat sit on the red sofa, a green apple on a table"],
)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with owlv2, owlvit, blip, git and nltk."""
    root = tmp_path_factory.mktemp("models")
    for name in ("owlv2", "owlvit", "blip", "git"):
        (root / name).mkdir()
    tiny_models.owlv2(root / "owlv2")
    tiny_models.owlv2(root / "owlvit", model_type="owlvit")
    tiny_models.blip(root / "blip")
    tiny_models.git(root / "git")
    tiny_models.nltk_data(root / "nltk")
    return root


@pytest.fixture
def nltk_data(models) -> Iterator[Path]:
    import nltk

    folder = str(models / "nltk")
    nltk.data.path.insert(0, folder)
    yield models / "nltk"
    nltk.data.path.remove(folder)


@pytest.fixture
def pairs(tmp_path) -> Callable[..., Path]:
    """A .jsonl of images with captions; the files at `bad` hold no image."""

    def make(count: int, bad: tuple[int, ...] = (), folder: str = "src") -> Path:
        root = tmp_path / folder
        root.mkdir()
        lines = []
        for i in range(count):
            (root / f"{i:03}.jpg").write_bytes(b"no image" if i in bad else jpeg(i))
            lines.append(json.dumps({"image": f"{i:03}.jpg", "text": CAPTIONS[i % len(CAPTIONS)]}))
        (root / "pairs.jsonl").write_text("\n".join(lines) + "\n")
        return root / "pairs.jsonl"

    return make


def jpeg(seed: int, turned: int = 1) -> bytes:
    """A smooth picture of another size for every seed, with an EXIF orientation."""
    knots = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    size = (40 + seed * 13 % 70, 45 + seed * 17 % 60)
    exif = Image.Exif()
    exif[0x0112] = turned
    file = io.BytesIO()
    Image.fromarray(knots).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


@pytest.fixture
def vesl(monkeypatch) -> Callable[..., tuple[int, str]]:
    """`python -m locfast.vesl ...`, in this process: exit code and what stood on stderr."""
    from locfast.vesl.__main__ import main

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vesl", *map(str, arguments)])
        told = io.StringIO()
        with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), told.getvalue()

    return run


@pytest.fixture
def flags(models) -> list[object]:
    """Of a whole run with given captions: small shards, so that there are several."""
    return [
        *("--captions", "given", "--detector", models / "owlv2", "--detector-size", 64),
        *("--shard-size", 5, "--batch-size", 2, "--workers", 0, "--device", "cpu"),
    ]
