"""Every sample once an epoch on any number of ranks, and exactly the missing ones after a resume; at any size."""

import io
import math
import tarfile
import time

import numpy as np
import pytest
import torch

from locfast.data.loader import Loader
from locfast.data.order import arrange
from locfast.data.sources import open_source
from locfast.data.spec import ImageSpec, Record, View
from locfast.engine.schedule import Plan

SPEC = ImageSpec({"image": View((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))})
RANKS = (1, 2, 4)


@pytest.fixture(scope="module", params=["folder", "shards", "blocks of a folder"])
def made(request, tmp_path_factory):
    """103 files, the bytes of each its number, in a folder or in shards of 40, 1, 0 and 62: (source, shuffle)."""
    root = tmp_path_factory.mktemp("once")
    if "folder" in request.param:
        for i in range(103):
            (root / f"{i:03}.jpg").write_bytes(b"%d" % i)
        return open_source(str(root)), "blocks" if "blocks" in request.param else "auto"
    for shard, samples in enumerate((range(40), range(40, 41), (), range(41, 103))):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in samples:
                info = tarfile.TarInfo(f"{i:03}.jpg")
                info.size = len(b"%d" % i)
                tar.addfile(info, io.BytesIO(b"%d" % i))
    return open_source(str(root)), "auto"


def shown(made, ranks: int, start: int, plan: dict) -> list[list[int]]:
    """What each step from `start` on shows, over all ranks: the bytes of its samples."""
    source, shuffle = made
    steps: list[list[int]] = []
    for rank in range(ranks):
        mine = Plan.of(len(source), ranks=ranks, rank=rank, **plan)
        ordered, order = arrange(source, 5, shuffle)
        for number, position in enumerate(mine.micro_batches(start)):
            if number // mine.accumulation == len(steps):
                steps.append([])
            read = [int(ordered.read(index).image) for index in order(position)[1].tolist()]
            steps[number // mine.accumulation] += read
    return steps


@pytest.mark.parametrize("ranks", RANKS)
def test_each_sample_comes_once_an_epoch_on_any_number_of_ranks(made, ranks):
    """Ten steps of 24 in micro-batches of 6 are two epochs of 103 and a part of the third."""
    steps = shown(made, ranks, 0, {"batch": 24, "micro_batch": 6, "steps": 10})
    source, shuffle = made
    stream = arrange(source, 5, shuffle)[1](torch.arange(240))[1]
    for part in stream[:206].split(103):
        assert sorted(part.tolist()) == list(range(103))
    assert [sorted(step) for step in steps] == [sorted(part.tolist()) for part in stream.split(24)]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_resume_in_the_middle_of_an_epoch_shows_exactly_what_is_missing(made, ranks):
    """72 samples before it on one rank, and the 31 others in the two steps behind it, the second of which goes on
    with the next epoch."""
    before = shown(made, 1, 0, {"batch": 24, "micro_batch": 6, "steps": 3})
    first, second = shown(made, ranks, 3, {"batch": 24, "micro_batch": 6, "steps": 5})
    seen = {sample for step in before for sample in step}
    assert len(seen) == 72
    assert len(first) == len(second) == 24
    assert not seen & set(first)
    missing = set(range(103)) - seen - set(first)
    assert len(missing) == 7
    assert missing <= set(second)


class Listing:
    """Ten million names of one picture, in shards of 10000 or in none."""

    def __init__(self, image: bytes, shards: bool) -> None:
        self.image, self.shards = image, shards

    def __len__(self) -> int:
        return 10_000_000

    def name(self, index: int) -> str:
        return f"{index:08}.jpg"

    def groups(self) -> np.ndarray | None:
        return np.arange(0, len(self), 10_000) if self.shards else None

    def read(self, index: int) -> Record:
        return Record(self.image, self.name(index))


@pytest.mark.parametrize("shards", [False, True], ids=["full", "blocks"])
def test_a_resume_among_ten_million_files_has_its_first_batch_within_two_seconds(jpeg, shards):
    """The quickest of three tries: other tests may hold the cores."""
    source = Listing(jpeg(), shards)
    plan = Plan.of(len(source), 256, None, steps=200_000)
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        batches = Loader(source, SPEC, seed=0, workers=1).batches(plan.micro_batches(137_000))
        batch = next(batches)
        seconds = min(seconds, time.perf_counter() - start)
        batches.close()
        if seconds < 2:
            break
    assert batch["views"]["image"].shape == (256, 3, 32, 32)
    assert batch["position"][0] == 137_000 * 256
    assert batch["epoch"].tolist() == [3] * 256
    assert seconds < 2
