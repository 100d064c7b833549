"""Real files for the data room: photographs-like pictures, damaged files, shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A folder of test data kept outside of the repository; skips where it is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"no {SHARED / name}")
        return SHARED / name

    return find


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """A smooth colourful picture, another one for every seed."""

    def draw(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
        knots = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        return Image.fromarray(knots).resize((width, height), Image.Resampling.BICUBIC)

    return draw


@pytest.fixture
def encode() -> Callable[..., bytes]:
    def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return encoded


@pytest.fixture
def jpeg(picture, encode) -> Callable[..., bytes]:
    def encoded(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
        return encode(picture(width, height, seed), quality=90)

    return encoded


@pytest.fixture
def folder(tmp_path, jpeg) -> Callable[[int], Path]:
    """A folder of `count` small JPEG files of different sizes, named 000.jpg, 001.jpg, ..."""

    def make(count: int) -> Path:
        root = tmp_path / f"folder-{count}"
        root.mkdir()
        for i in range(count):
            (root / f"{i:03}.jpg").write_bytes(jpeg(40 + i % 7 * 9, 40 + i % 5 * 11, i))
        return root

    return make


@pytest.fixture
def damage(jpeg) -> Callable[[Path], list[str]]:
    """Spoil ten files of a folder in ten ways; returns their names."""

    def spoil(root: Path) -> list[str]:
        files = sorted(root.glob("*.jpg"))[3::9][:10]
        whole = jpeg(300, 200, 1)
        bad = [
            whole[: len(whole) // 2],
            whole[:200],
            whole[:2],
            b"",
            b"this is a text file\n" * 20,
            b"\x00" * 5000,
            b"<html><body>404 Not Found</body></html>",
            b"\x89PNG\r\n\x1a\n" + b"\xff" * 500,
            b"GIF89a" + b"\x10" * 30,
        ]
        for file, data in zip(files, bad, strict=False):
            file.write_bytes(data)
        files[9].unlink()
        files[9].symlink_to(root / "gone.jpg")
        return [str(file) for file in files]

    return spoil


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """Write members (name -> bytes) to a tar file."""

    def write(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
        with tarfile.open(path, mode) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write
