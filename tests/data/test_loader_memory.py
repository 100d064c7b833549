"""The memory of a loader and its worker does not grow with the batches it has made."""

import multiprocessing
import os

import torch

from locfast.data.loader import Loader
from locfast.data.sources import ImageFolder
from locfast.data.spec import ImageSpec, View

SPEC = ImageSpec({"image": View((16, 16), (0.5,) * 3, (0.5,) * 3, crop="random_resized", flip=True)})


def held(process: int) -> int:
    """Bytes that a process keeps for itself: what it shares with others is theirs too."""
    with open(f"/proc/{process}/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) * 1024


def growth(root, workers: int, first: int, last: int) -> int:
    before = set(multiprocessing.active_children())
    loader = Loader(ImageFolder(root), SPEC, seed=0, workers=workers)
    batches = loader.batches(torch.arange(k * 4, k * 4 + 4) for k in range(last))
    seen = []
    for number, _ in enumerate(batches, 1):
        if number in (first, last - 20):  # near the end, but with the worker still at work
            processes = [os.getpid(), *(child.pid for child in set(multiprocessing.active_children()) - before)]
            assert len(processes) == 1 + workers
            seen.append(sum(map(held, processes)))
    assert number == last
    return seen[1] - seen[0]
