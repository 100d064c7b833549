"""Workers that die, workers whose parent dies, and Ctrl-C while workers are busy: real processes, really killed."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from locfast import interrupt
from locfast.config.files import to_dict
from locfast.data.loader import Loader
from locfast.data.order import Order
from locfast.data.sources import ImageFolder
from locfast.data.spec import ImageSpec, View
from tests.engine import processes
from tests.engine.toy import toy_config

SPEC = ImageSpec({"image": View((32, 32), (0.5,) * 3, (0.5,) * 3)})
BOUND = 2.0
"""Seconds within which everything ends."""


def hang() -> None:
    time.sleep(1000)


def leave() -> None:
    os._exit(7)


def crash() -> None:
    ctypes.string_at(0)


def at_a_file(name: str, act, told: Path) -> None:
    """Have `act` done where file `name` is read, once `told` names the process that does it."""
    read = ImageFolder.read

    def reading(source, index):
        if source.name(index).endswith(name):
            told.with_suffix(".part").write_text(str(os.getpid()))
            told.with_suffix(".part").rename(told)
            act()
        return read(source, index)

    ImageFolder.read = reading


def started(target, *args):
    process = processes._server.Process(target=target, args=args)
    process.start()
    return process


def written(path: Path) -> str:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"nobody wrote {path}"
        time.sleep(0.005)
    return path.read_text()


def gone(pid: int) -> bool:
    """Ended; nobody may be there to collect an orphan, which then stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def seconds_until(condition) -> float:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + 30
        time.sleep(0.005)
    return time.monotonic() - begin


def _train(values: dict, output: str, name: str, act, told: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    interrupt.PATIENCE = 1000.0  # the run has to end by itself
    if name:
        at_a_file(name, act, told)
    processes._train(values, output, {})


@pytest.mark.parametrize(
    ("act", "how"),
    [(hang, "was killed (Killed)"), (leave, "ended with exit code 7"), (crash, "was killed (Segmentation fault)")],
)
def test_a_worker_that_dies_is_told_with_the_file_it_was_reading(act, how, folder, tmp_path):
    root, told = folder(12), tmp_path / "pid"
    values = to_dict(toy_config(root, tmp_path / "run", workers=2, steps=100000))
    run = started(_train, values, str(tmp_path / "out"), "005.jpg", act, told)
    pid = int(written(told))
    if act is hang:
        os.kill(pid, signal.SIGKILL)
    assert processes.finish(run, seconds=30) == [2]
    message = (tmp_path / "out").read_text()
    assert f") {how} while reading {root}/005.jpg; " in message
    assert f"(pid {pid})" in message or act is not hang  # two that die of one file may both write
    assert "--workers 0" in message
    assert "Traceback" not in message


def _iterate(root: Path, name: str, act, told: Path) -> None:
    at_a_file(name, act, told.with_name("busy"))
    loader = Loader(ImageFolder(root), SPEC, seed=0, workers=2)
    batches = loader.batches(torch.arange(k * 4, k * 4 + 4) for k in range(10**6))
    next(batches)
    told.with_suffix(".part").write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    told.with_suffix(".part").rename(told)
    hang()


@pytest.mark.parametrize("act", [int, hang], ids=["idle", "busy"])
def test_workers_end_when_their_parent_is_killed(act, folder, tmp_path):
    root = folder(12)
    name = f"{Order(12, 0)(torch.tensor([5]))[1].item():03}.jpg"  # of the second batch
    parent = started(_iterate, root, name, act, tmp_path / "workers")
    workers = [int(pid) for pid in written(tmp_path / "workers").split()]
    assert len(workers) == 2
    written(tmp_path / "busy")
    time.sleep(0.2)  # what may be made in advance is made, and idle workers wait
    assert not any(map(gone, workers))
    os.kill(parent.pid, signal.SIGKILL)
    assert seconds_until(lambda: all(map(gone, workers))) < BOUND


def test_batches_that_take_longer_than_a_poll_arrive_whole_and_in_order(folder, monkeypatch):
    read, source = ImageFolder.read, ImageFolder(folder(12))
    positions = torch.arange(24).split(4)
    wanted = list(Loader(source, SPEC, seed=0, workers=0).batches(positions))
    monkeypatch.setattr("locfast.data.loader.POLL", 0.01)
    monkeypatch.setattr(ImageFolder, "read", lambda self, index: time.sleep(0.02) or read(self, index))
    made = list(Loader(source, SPEC, seed=0, workers=2).batches(positions))
    assert [batch["position"].tolist() for batch in made] == [part.tolist() for part in positions]
    assert all(torch.equal(a["views"]["image"], b["views"]["image"]) for a, b in zip(made, wanted, strict=True))


def test_closing_an_iterator_does_not_wait_for_a_busy_worker(folder, tmp_path, monkeypatch):
    root, told = folder(12), tmp_path / "busy"
    monkeypatch.setattr(ImageFolder, "read", ImageFolder.read)  # put back afterwards
    at_a_file(f"{Order(12, 0)(torch.tensor([5]))[1].item():03}.jpg", hang, told)
    before = set(multiprocessing.active_children())
    batches = Loader(ImageFolder(root), SPEC, seed=0, workers=2).batches(torch.arange(12).split(4))
    next(batches)
    written(told)
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < BOUND
    assert not set(multiprocessing.active_children()) - before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("busy", ["reading", "decoding"])
def test_ctrl_c_ends_a_run_whose_workers_are_busy_within_two_seconds(busy, workers, folder, tmp_path, jpeg):
    """A read that does not come back, or photographs of 48 million pixels: half a second each to decode."""
    root, told = folder(12), tmp_path / "pid"
    if busy == "decoding":
        large = jpeg(8000, 6000)
        for file in root.iterdir():
            file.write_bytes(large)
    values = to_dict(toy_config(root, tmp_path / "run", workers=workers, steps=100000))
    run = started(_train, values, str(tmp_path / "out"), "005.jpg", hang if busy == "reading" else int, told)
    written(told)
    time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    assert seconds_until(lambda: gone(run.pid)) < BOUND
    assert processes.finish(run) == [130]
    assert (tmp_path / "out").read_text().endswith("locfast: Stopped by Ctrl-C.\n")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_may_end_with_its_iterator_open(folder, workers):
    program = f"""
import torch
from locfast.data.loader import Loader
from locfast.data.sources import open_source
from locfast.data.spec import ImageSpec, View

spec = ImageSpec({{"image": View((8, 8), (0.5,) * 3, (0.5,) * 3)}})
batches = Loader(open_source({str(folder(8))!r}), spec, seed=0, workers={workers}).batches([torch.arange(4)] * 100)
next(batches)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
