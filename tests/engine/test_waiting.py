"""What training waits for is measured, named once for each cause, and told with a flag that fits the machine."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from locfast.data.assemble import Assembler
from locfast.data.sources import ImageFolder
from locfast.engine.progress import Meter
from locfast.engine.run import train
from locfast.engine.run_folder import RunFolder
from locfast.engine.schedule import Plan
from locfast.engine.waiting import SLOW, Pipeline, Waiting, cause
from tests.engine.toy import Toy, make_images, toy_config


@pytest.mark.parametrize(
    ("wait", "read", "decode", "transfer", "named"),
    [
        (0.5, 9.0, 3.0, 0.1, "read"),
        (0.5, 3.0, 9.0, 0.1, "decode"),
        (0.5, 3.0, 9.0, 2.6, "transfer"),  # more than half of a wait of 5 ms
        (0.5, 3.0, 9.0, 2.4, "decode"),
        (0.2, 3.0, 9.0, 1.1, "transfer"),
        (SLOW, 3.0, 9.0, 1.1, None),
        (0.5, 0.0, 0.0, 0.0, None),
    ],
)
def test_the_cause_is_what_most_of_the_wait_goes_to(wait, read, decode, transfer, named):
    """Of 10 milliseconds an image; several workers read and decode, so theirs may add up to more."""
    assert cause(wait, 10.0, read, decode, transfer) == named


ALL = ("auto", "cpu", "nvjpeg", "dali")


@pytest.mark.parametrize(
    ("why", "pipeline", "told"),
    [
        ("read", Pipeline("cuda", 4, 16, "cpu", ALL), "--workers 8"),
        ("read", Pipeline("cuda", 0, 16, "cpu", ALL), "--workers 15 reads ahead"),
        ("read", Pipeline("cpu", 2, 2, "cpu", ALL), "tar shards"),
        ("decode", Pipeline("cuda", 4, 16, "cpu", ALL), "4 of 16 cores decode: --workers 15"),
        ("decode", Pipeline("cuda", 15, 16, "cpu", ALL), "--decoder nvjpeg or dali"),
        ("decode", Pipeline("cuda", 15, 16, "dali", ALL), "All cores decode; images stored at a smaller size"),
        ("decode", Pipeline("cuda", 15, 16, "cpu", ("auto", "cpu")), "All cores decode; images stored at a smaller"),
        ("decode", Pipeline("cpu", 1, 16, "cpu", ALL), "share the cores"),
        ("transfer", Pipeline("cuda", 4, 16, "nvjpeg", ALL), "--decoder cpu"),
        ("transfer", Pipeline("cuda", 16, 16, "cpu", ALL), "--workers 15 leaves it a core"),
        ("transfer", Pipeline("cuda", 4, 16, "cpu", ALL), "--image-size"),
    ],
)
def test_the_advice_fits_the_machine(why, pipeline, told):
    assert told in pipeline.advice(why)


def test_on_a_cpu_nothing_is_promised_of_more_workers_that_decode():
    assert not re.search(r"--workers \d", Pipeline("cpu", 1, 16, "cpu").advice("decode"))


def numbers(**changes: float) -> dict[str, float]:
    usual = {"images_per_second": 100.0, "data_wait": 0.5}
    return {**usual, "data_read_ms": 9.0, "data_decode_ms": 3.0, "data_transfer_ms": 0.1, **changes}


def test_each_cause_is_told_once_and_none_of_the_first_interval(caplog):
    waiting = Waiting(Pipeline("cuda", 4, 16, "cpu", ALL), ranks=1)
    decoding = numbers(data_decode_ms=20.0)
    with caplog.at_level("INFO", "locfast"):
        for heard in (numbers(), numbers(data_wait=0.05), numbers(), decoding, numbers(), decoding):
            waiting.hear(heard)
    told = [record.getMessage() for record in caplog.records]
    assert [re.search("mostly for ([a-z]+)", message)[1] for message in told] == ["reading", "decoding"]
    assert "50 % of the time" in told[0]
    assert "takes 9 ms to read, 3 to decode and 0.1 to" in told[0]


def test_the_time_of_an_image_is_that_of_a_rank(caplog):
    """Two ranks at 100 images a second: 20 ms an image each, half of which is waited for; 4 of 10 ms is not most."""
    with caplog.at_level("INFO", "locfast"):
        for ranks, named in ((1, "assembling"), (2, "reading")):
            waiting = Waiting(Pipeline("cuda", 4, 16, "cpu", ALL), ranks, heard=True)
            waiting.hear(numbers(data_transfer_ms=4.0))
            assert f"mostly for {named}" in caplog.records[-1].getMessage()


def test_the_meter_gives_milliseconds_an_image_of_the_interval():
    spent = {"read": 7.0, "decode": 0.0, "transfer": 0.0}
    meter = Meter(Plan.of(1000, 20, None, ranks=2, steps=50), torch.device("cpu"), None, spent)
    meter.start(0)
    spent["read"] += 0.5
    assert meter.read(5)["data_read_ms"] == pytest.approx(10.0)  # 5 steps of 10 images on this rank
    spent["read"] += 0.1
    assert meter.read(6)["data_read_ms"] == pytest.approx(10.0)


def logged(data: Path, run: Path, **settings: object) -> tuple[list[str], dict[str, float]]:
    """The causes in the log of a short run, and the mean numbers of its intervals but the first."""
    train(toy_config(data, run, **{"steps": 10, "log_every": 3, **settings}))
    entries = RunFolder(run).read_metrics()[1:]
    means = {name: sum(entry[name] for entry in entries) / len(entries) for name in entries[0] if "data" in name}
    return re.findall("mostly for ([a-z]+)", (run / "train.log").read_text()), means


@pytest.mark.parametrize("workers", [0, 2])
def test_slow_reads_are_named(images, tmp_path, monkeypatch, workers):
    read = ImageFolder.read
    monkeypatch.setattr(ImageFolder, "read", lambda self, index: time.sleep(0.04) or read(self, index))
    told, means = logged(images, tmp_path / "run", workers=workers)
    assert told[0] == "reading"  # where the machine is busy, a later interval may wait a little for something else
    assert means["data_read_ms"] >= 40 > means["data_transfer_ms"]
    assert means["data_wait"] > SLOW


@pytest.mark.parametrize("workers", [0, 2])
def test_slow_decoding_is_named(tmp_path, jpeg_of, workers):
    """Photographs of three million pixels, which PIL needs some ten milliseconds for."""
    data = make_images(tmp_path / "data", 8)
    for file in data.iterdir():
        file.write_bytes(jpeg_of(2048, 1536))
    told, means = logged(data, tmp_path / "run", workers=workers)
    assert told[0] == "decoding"
    assert means["data_decode_ms"] > 2 > means["data_read_ms"]


def test_slow_assembling_is_named(images, tmp_path, monkeypatch):
    assemble = Assembler.__call__
    monkeypatch.setattr(Assembler, "__call__", lambda self, *parts: time.sleep(0.1) or assemble(self, *parts))
    told, means = logged(images, tmp_path / "run", workers=2)
    assert told == ["assembling"]
    assert means["data_transfer_ms"] >= 100 / 8  # of a batch of eight


def test_a_run_that_does_not_wait_is_told_nothing(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "after_step", lambda self, step, steps: time.sleep(0.1))
    told, means = logged(images, tmp_path / "run", workers=2)
    assert told == []
    assert means["data_wait"] < SLOW
    assert means["data_decode_ms"] > 0
