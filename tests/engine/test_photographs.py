"""The train command on real photographs, as a user types it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("folder", ["photos", "photos_original"])
def test_a_backbone_trains_on_photographs(folder: str, shared: Path, tmp_path: Path) -> None:
    """photos_original holds grey, tiny and large files. 64 px and few steps, so that two cores do it in seconds."""
    command = f"--data {shared / 'data' / folder} --model vit_tiny_patch16_224 --no-pretrained --image-size 64"
    flags = "--steps 12 --batch-size 16 --lr 1e-3 --log-every 1 --val none --device cpu --out"
    process = subprocess.run(
        [sys.executable, "-m", "locfast.train", *command.split(), *flags.split(), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] / 2
