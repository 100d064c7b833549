"""How near does select_views come to the speed of a copy? At the shapes and with the options of mask_embeddings."""

from __future__ import annotations

from typing import Any

import torch
from mask_embeddings import run
from torch import Tensor

from locfast.kernels import select_views as room


def main() -> None:
    # its kernels are those of mask_embeddings
    run("select_views", ["select_views", "mask_embeddings"], __doc__, picked, plain, torch.bfloat16)


def picked(rows: Tensor, visible: Tensor, places: Tensor, **backend: Any) -> Tensor:
    return room.select_views(rows, places, visible, **backend)


def plain(rows: Tensor, visible: Tensor, places: Tensor) -> Tensor:
    return room.reference.select_views(rows, places, visible)


if __name__ == "__main__":
    main()
