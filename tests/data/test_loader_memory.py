"""The memory of a loader and its worker does not grow with the batches it has made."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from locfast.data.loader import Loader
from locfast.data.sources import ImageFolder
from locfast.data.spec import ImageSpec, View

SPEC = ImageSpec({"image": View((64, 64), (0.5,) * 3, (0.5,) * 3, crop="random_resized", flip=True)})

BOUND = 4 * 2**20
"""Bytes by which both processes together may grow: what malloc and Python keep at hand moves by 1 to 2 MiB. Over 1200
batches the bound is 3.4 KiB a batch, over 9000 it is 466 bytes; the bytes of one batch's pixels alone are 24 KiB."""


def resident(process: int) -> int:
    """Bytes of a process in memory, shared ones too: a page that a fork shared counts alike when it has been copied."""
    with open(f"/proc/{process}/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def growth(root: Path, workers: int, first: int, last: int, decoder: str = "cpu") -> int:
    """Bytes by which this process and its workers grow between two batches."""
    before = set(multiprocessing.active_children())
    source = ImageFolder(root)
    indices = (torch.arange(k * 2, k * 2 + 2) % len(source) for k in range(last + 50))  # workers are busy to the end
    batches = Loader(source, SPEC, seed=0, workers=workers, decoder=decoder).sequential(0, indices)
    seen = []
    for number, _ in enumerate(batches, 1):
        if number in (first, last):
            processes = [os.getpid(), *(child.pid for child in set(multiprocessing.active_children()) - before)]
            assert len(processes) == 1 + workers
            seen.append(sum(map(resident, processes)))
    return seen[1] - seen[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_stays_flat_over_twelve_hundred_batches(workers, folder):
    assert growth(folder(8), workers, 300, 1500) < BOUND


def test_memory_stays_flat_with_a_decoder_that_hands_on_its_own_memory(folder):
    pytest.importorskip("nvidia.dali")
    assert growth(folder(8), 1, 300, 1500, "dali") < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_stays_flat_over_ten_thousand_batches(workers, folder):
    assert growth(folder(8), workers, 1000, 10000) < BOUND
