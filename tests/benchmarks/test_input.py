"""The benchmark of the input pipeline: what it refuses, what it compares with, and that it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import _input_report
import input as benchmark
import numpy as np
import pytest
import report
import torch
from _input_check import Pixels, outcome
from _results import Measurement, Row
from baselines import loading
from PIL import Image


@pytest.fixture
def photos(tmp_path) -> Path:
    """Eight smooth JPEG files of 96 x 72 pixels, and a PNG, which no JPEG decoder can read."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        knots = np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        image = Image.fromarray(knots).resize((96, 72), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.{'JPEG' if i % 2 else 'jpg'}", quality=90)
    image.save(folder / "not.png")
    return folder


def test_every_way_is_timed_on_the_same_photographs(photos, tmp_path, monkeypatch, capsys):
    asked = ["--smoke", "--device", "cpu", "--workers", "1", "--size", "32", "--photos", str(photos)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/input.py", *asked, "--out", str(tmp_path)])
    benchmark.main()
    told = capsys.readouterr().out
    found = Measurement.read(tmp_path / "cpu" / "input.json")
    assert found.smoke and found.sources["locfast/data/decode"] and "cores" in found.machine["cpu"]
    timed = {row.who: row for row in found.rows if row.direction == "batch"}
    for who in ("locfast cpu, folder", "locfast cpu, tar", "DataLoader, PIL, folder"):
        row = timed[who]
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
        assert row.rate == pytest.approx(1e3 * row.shape["B"] / row.ms)
        assert f"{who:<32}" in told
    assert all(row.ms is not None or row.note for row in found.rows)  # whatever was not timed has a reason
    assert {row.who for row in found.rows if row.direction == "CPU"} >= {
        "locfast cpu, folder",
        "DataLoader, PIL, folder",
    }


def test_without_photographs_it_says_so_and_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/input.py", "--out", str(tmp_path), "--device", "cpu"])
    monkeypatch.setattr(benchmark, "PHOTOS", [tmp_path / "nowhere"])
    benchmark.main()
    assert "nothing is measured" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_right_pixels_pass_and_a_crop_that_is_two_pixels_off_is_refused(photos):
    source = benchmark.jpegs(photos, None)
    assert len(source) == 8
    pixels = Pixels(source, 32)
    right = loading.pil([], 32, benchmark.MEAN, benchmark.STD).pixels
    assert "levels off" in outcome(lambda: pixels.of_peer(right))["note"]
    off = outcome(lambda: pixels.of_peer(lambda data, box: right(data, tuple(side + 2 for side in box))))
    assert off["failed"].startswith("refused, result is wrong")


def test_a_decoder_that_is_not_there_has_its_reason(photos):
    told = outcome(lambda: Pixels(benchmark.jpegs(photos, 2), 32).of_decoder("none such", torch.device("cpu")))
    assert told["failed"].startswith("did not run: UserError: asked for --decoder none such")


def test_shards_hold_the_files_over_and_over(photos, tmp_path):
    files = sorted(photos.glob("*.jpg"))
    paths = benchmark.write_shards(files, tmp_path / "shards", 3, 2)
    source = benchmark.TarShards(paths)
    assert [source.read(i).image for i in range(6)] == [files[i % 4].read_bytes() for i in range(6)]


def test_peers_give_endless_normalised_batches(photos):
    files = sorted(photos.glob("*.jpg"))
    for make in (loading.pil, loading.torchvision_jpeg):
        batches = make(files, 32, benchmark.MEAN, benchmark.STD).start(0, 5, torch.device("cpu"))
        first, second = next(batches), next(batches)
        batches.close()
        assert first.shape == (5, 3, 32, 32) and first.dtype == torch.float32
        assert first.min() < 0 < first.max() and not torch.equal(first, second)


def test_webdataset_gives_the_same_shapes(photos, tmp_path):
    pytest.importorskip("webdataset")
    paths = benchmark.write_shards(sorted(photos.glob("*.jpg")), tmp_path / "shards", 2, 4)
    batches = loading.webdataset(paths, 32, benchmark.MEAN, benchmark.STD).start(0, 5, torch.device("cpu"))
    assert [next(batches).shape for _ in range(5)] == [(5, 3, 32, 32)] * 5
    batches.close()


def row(who: str, rate: float, size: int = 224) -> list[Row]:
    shape = {"B": 64, "workers": 2, "size": size}
    ms = 64e3 / rate
    batch = Row("photos, 224 px", "batch", who, ms, ms, ms, rate, "images/s", note="0.1 of 255 levels off", shape=shape)
    return [batch, Row("photos, 224 px", "CPU", who, 5.0, 4.0, 6.0, shape=shape)]


@pytest.fixture
def results(tmp_path) -> Path:
    """One GPU with a step of clip_b16: eager 1000, compiled 1600 images a second; the public code is faster still."""
    steps = [
        Row("clip_b16, bf16, micro-batch 64", "step", who, 64e3 / rate, 1.0, 1.0, 1.0, "TFLOP/s", shape={"B": 64})
        for who, rate in (("locfast", 1000), ("locfast compiled", 1600), ("public code", 2000))
    ]
    common = {
        "sources": {},
        "commit": "0" * 40,
        "dirty": False,
        "date": "2026-01-02",
        "machine": {"gpu": "NVIDIA H200"},
    }
    Measurement(benchmark="step", rows=steps, **common).write(tmp_path / "results")
    rows = [*row("locfast cpu, folder", 2400.0), *row("DataLoader, PIL, folder", 800.0)]
    Measurement(benchmark="input", rows=rows, **common).write(tmp_path / "results")
    return tmp_path / "results"


def test_needs_are_those_of_the_fastest_step_that_was_measured(results):
    needs = {need.recipe: need for need in _input_report.needs(results)}
    assert needs["clip_b16"].rate == pytest.approx(1600) and needs["clip_b16"].gpu == "NVIDIA H200"
    assert needs["clip_l14_336"].rate is None and needs["clip_l14_336"].size == 336
    told = _input_report.told(list(needs.values()))
    assert "clip_b16 1600 at 224 px (NVIDIA H200)" in told
    assert "clip_l14_336" in told.partition("No step was measured of")[2]


def test_the_page_sets_every_way_beside_the_peer_and_the_step(results):
    page = report.render(results)
    section = page[page.index("### JPEG to batch") :]
    line = "| locfast cpu, folder | 2400 (2400, 2400) | 3.00x | 5.00 (4.00, 6.00) | 1.50x | 0.1 of 255 levels off |"
    assert line in section.splitlines()


def test_a_step_of_another_size_is_not_set_beside_it():
    needs = [_input_report.Need("clip_l14_336", 336, 200.0, "NVIDIA H200")]
    table = _input_report.tables(row("locfast cpu, folder", 100.0))[0]
    assert _input_report.against_needs(table, table.ways["locfast cpu, folder"], needs) == {}
