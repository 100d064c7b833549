"""What every export shares: files written aside and renamed, code that travels with them, features to check against."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.models.backbone import Backbone

STANDALONE = Path(__file__).parent / "standalone"

SAME = 5e-3
"""Relative L2 between the exported model's features and the backbone's; TF32 convolutions on a GPU need this much."""


@dataclass(frozen=True)
class Features:
    """Which tokens of a backbone a target hands on: behind how many blocks, the final norm or not, prefixes or not."""

    blocks: int
    norm: bool = True
    prefix: bool = True

    @torch.no_grad()
    def of(self, backbone: Backbone, images: Tensor, softcap: float | None) -> Tensor:
        """images [B, 3, H, W] -> [B, T or N, C] in fp32 on the CPU, by the backbone itself, in eval mode."""
        device, training = next(backbone.parameters()).device, backbone.training
        backbone.eval()
        with torch.autocast(device.type, enabled=False):
            x = backbone.add_prefix_and_position(backbone.embed_patches(images.to(device)))
            x = backbone.run_blocks(x, stop=self.blocks, softcap=softcap)
            x = backbone.final_norm(x) if self.norm else x
        backbone.train(training)
        return x.float().cpu() if self.prefix else x[:, backbone.num_prefix_tokens :].float().cpu()


def write_aligned(folder: Path, backbone: Backbone, features: Features, softcap: float | None, **more: Any) -> None:
    """aligned.json, which the code in `standalone/` reads: the cap, and which tokens to take."""
    values = {"softcap": softcap, **asdict(features), "image_size": backbone.image_size[0], **more}
    (folder / "aligned.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write in; its files replace those of `folder`, each at once, if all went well."""
    folder = folder.resolve()  # "." has no name to write aside under
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        folder.mkdir(exist_ok=True)
        for file in sorted(aside.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def standalone(name: str) -> Any:
    """The module standalone/NAME.py under its bare name, as it is imported where an export went."""
    sys.path.insert(0, str(STANDALONE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(STANDALONE))


def copy_standalone(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copyfile(STANDALONE / f"{name}.py", folder / f"{name}.py")


def needs(module: str, extra: str, target: str) -> None:
    """Raise UserError where a package that an export is checked with is not installed."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--to {target}: every export is loaded and compared before it is kept, and {module} is not installed "
            f"({error}). Type pip install 'locfast[{extra}]'."
        ) from error


def some_noise(backbone: Backbone) -> Tensor:
    """Images [4, 3, H, W] to measure on where a run's own are out of reach."""
    return torch.randn(4, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))


def relative(approximate: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    return ((approximate.float() - exact.float()).norm() / exact.float().norm()).item()


def check_same(what: str, found: Tensor, expected: Tensor) -> float:
    """Relative L2 between the two; raises RuntimeError where it is not small, so that nothing wrong is written."""
    difference = relative(found, expected)
    if not difference < SAME:
        raise RuntimeError(
            f"{what} does not compute what was trained: relative L2 {difference:.2e}; nothing was written"
        )
    return difference
