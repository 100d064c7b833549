"""`python -m locfast.data bench`, and how it measures."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import pytest
import torch

from locfast.data.commands import bench
from locfast.data.commands.rate import cpu_seconds, measure

SPIN = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ntime.sleep(60)"


def test_cpu_time_of_live_and_of_ended_children_counts():
    before = cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "done\n"
        alive = cpu_seconds() - before
    finally:
        child.kill()
        child.communicate()
    assert 0.45 < alive < 5  # the clock counts in hundredths; reading the line takes next to nothing
    assert cpu_seconds() - before >= alive - 0.02


def test_sleep_costs_no_cpu_time():
    before = cpu_seconds()
    time.sleep(0.3)
    assert cpu_seconds() - before < 0.2


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_clock_runs_over_whole_turns_of_all_workers_and_the_iterator_is_closed(workers):
    taken, closed = [], []

    def batches():
        try:
            while True:
                taken.append(time.perf_counter())
                time.sleep(0.01)
                yield None
        finally:
            closed.append(True)

    rate = measure(batches, 8, workers, 0.1)
    turn = max(1, workers)
    assert rate.images % (8 * turn) == 0 and rate.images >= 8 * turn
    assert len(taken) == max(3, turn) + rate.images // 8
    assert rate.seconds >= 0.1 and rate.images_per_second <= 8 / 0.01
    assert closed == [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_decoder_that_cannot_run_is_listed_with_its_reason(folder, capsys):
    code, told = run([str(folder(8)), "--decoder", "nvjpeg", "cpu", "--workers", "0"], capsys)
    assert code == 0
    assert "nvjpeg does not run here: " in told
    assert "nvJPEG needs a GPU" in told
    row = next(line for line in told.splitlines() if line.startswith("│ cpu"))
    images, cpu = (float(row.split("│")[i]) for i in (3, 4))
    assert images > 0 and cpu > 0


def run(words, capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    small = ["--batch", "4", "--size", "32", "--seconds", "0.2", "--device", "cpu"]
    return bench.run(parser.parse_args([*words, *small])), capsys.readouterr().out
