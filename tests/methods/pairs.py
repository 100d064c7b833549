"""Image-text pairs as tar shards, and a CLIP small enough that a step takes a moment."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from locfast.config.base import TrainConfig
from locfast.config.clip import ClipConfig
from locfast.config.registry import make_config
from tests.eval.tiny_clip import CONFIGS

COLOURS = {"red": (220, 30, 30), "green": (20, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
PLACES = ("left", "right", "top", "bottom", "middle", "corner")


def write_pairs(folder: Path, count: int = 24, captioned: bool = True) -> Path:
    """Two tar shards of JPEGs, each with its caption as KEY.txt: a colour at a place, every one another."""
    folder.mkdir(parents=True)
    names = [(colour, place) for colour in COLOURS for place in PLACES]
    generator = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"pairs-{shard}.tar", "w") as tar:
            for i in range(shard * count // 2, (shard + 1) * count // 2):
                colour, place = names[i % len(names)]
                pixels = generator.integers(0, 60, (6, 6, 3), dtype=np.uint8)
                pixels[PLACES.index(place) % 6, PLACES.index(place) // 2 :] = COLOURS[colour]
                file = io.BytesIO()
                Image.fromarray(pixels).resize((48, 40), Image.Resampling.BILINEAR).save(file, "JPEG", quality=95)
                members = {f"{i:03}.jpg": file.getvalue()}
                if captioned:
                    members[f"{i:03}.txt"] = f"a {colour} thing at the {place}, number {i}".encode()
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def tiny_clip(folder: Path, kind: str = "clip") -> str:
    """The config file of a small open_clip model."""
    file = folder / f"locfast-{kind}.json"
    file.write_text(json.dumps(CONFIGS[kind]))
    return str(file)


def clip_config(
    data: Path | str, text: str, out: Path | str, clip: dict[str, Any] | None = None, **fields: Any
) -> TrainConfig:
    """A run of the method on one open_clip model's two towers: on the CPU, decoding in its own process."""
    settings: dict[str, Any] = {"model": "open_clip", "data": str(data), "out": str(out), "val": "none"}
    settings |= {"device": "cpu", "workers": 0, "log_every": 1, "batch_size": 8, "steps": 4, "lr": 1e-3}
    own = ClipConfig(**{"text": text, "text_pretrained": "none", "crop": "center", **(clip or {})})
    return make_config("clip", **{**settings, **fields}, clip=own)
