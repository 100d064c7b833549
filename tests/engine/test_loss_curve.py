"""The loss curve depends on the seed and on nothing else: not on ranks, micro-batches or workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from locfast.engine.run import train
from locfast.engine.run_folder import RunFolder
from tests.engine.processes import finish, start_ranks
from tests.engine.toy import ToyConfig, losses, toy_config

ROOT = Path(__file__).parents[2]
STEPS = 20
RANKS_AGREE = 1e-4
"""Relative: sums over ranks and micro-batches are added in another order, and 20 steps let that fp32 rounding grow."""


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return losses(train(toy_config(images, tmp_path_factory.mktemp("alone") / "run", steps=STEPS)))


def test_the_same_seed_gives_the_same_losses_bit_for_bit(images, alone, tmp_path):
    assert losses(train(toy_config(images, tmp_path / "run", steps=STEPS))) == alone


def test_another_seed_gives_other_losses(images, alone, tmp_path):
    other = losses(train(toy_config(images, tmp_path / "run", steps=STEPS, seed=1)))
    assert all(other[step] != alone[step] for step in alone)


def test_workers_do_not_change_a_bit(images, alone, tmp_path):
    assert losses(train(toy_config(images, tmp_path / "run", steps=STEPS, workers=2))) == alone


def test_the_loss_falls(images, tmp_path):
    curve = losses(train(toy_config(images, tmp_path / "run", steps=80, lr=1e-2)))
    assert sum(list(curve.values())[-10:]) < 0.8 * sum(list(curve.values())[:10])


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_accumulation_does_not_change_the_curve(images, alone, tmp_path, micro_batch):
    split = losses(train(toy_config(images, tmp_path / "run", steps=STEPS, micro_batch=micro_batch)))
    assert split == pytest.approx(alone, rel=RANKS_AGREE)
    assert len(alone) == STEPS


def test_loss_is_the_same_on_one_and_two_ranks(images, alone, tmp_path):
    run = _torchrun(images, tmp_path / "run", "--steps", str(STEPS))
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=RANKS_AGREE)


def test_loss_is_the_same_on_two_ranks_with_accumulation_and_their_held_out_loss_too(images, tmp_path):
    train(toy_config(images, tmp_path / "one", steps=12, val=str(images)))
    config = toy_config(images, tmp_path / "two", steps=12, val=str(images), micro_batch=2)
    assert finish(*start_ranks(config, tmp_path / "out", 2)) == [0, 0], (tmp_path / "out.0").read_text()
    one, two = (RunFolder(tmp_path / name).read_metrics() for name in ("one", "two"))
    for name in ("loss", "error/largest", "grad_norm", "val/loss", "val/error/largest"):
        values = [[entry[name] for entry in entries if name in entry] for entries in (one, two)]
        assert len(values[0]) == (2 if name.startswith("val") else 12)
        assert values[1] == pytest.approx(values[0], rel=RANKS_AGREE)


def test_a_batch_that_ranks_cannot_share_is_told_once(images, tmp_path):
    assert finish(*start_ranks(toy_config(images, tmp_path / "run", batch_size=7), tmp_path / "out", 2)) == [2, 2]
    assert "7 is not divisible by 2. Use --batch-size 6 or 8." in (tmp_path / "out.0").read_text()
    assert (tmp_path / "out.0").read_text().count("\n") == 1
    assert (tmp_path / "out.1").read_text() == ""


@pytest.mark.slow
def test_compiled_runs_follow_the_same_curve(images, alone, tmp_path):
    compiled = losses(train(toy_config(images, tmp_path / "run", steps=STEPS, compile=True)))
    assert compiled == pytest.approx(alone, rel=RANKS_AGREE)


def test_bf16_stays_near_fp32_and_changes_the_arithmetic(images, alone, tmp_path):
    rounded = losses(train(toy_config(images, tmp_path / "run", steps=STEPS, precision="bf16")))
    assert rounded != alone
    assert rounded == pytest.approx(alone, rel=0.02)  # bf16 has 8 bits: 0.4 % an operation


def test_grad_clip_limits_the_step_not_the_reported_norm(images, tmp_path):
    from locfast.config.base import OptimConfig

    sgd = OptimConfig(name="sgd", clip=1e-6, weight_decay=0.0)
    curve = train(toy_config(images, tmp_path / "run", ToyConfig(optim=sgd), steps=2, lr=1.0))
    first, second = RunFolder(curve).read_metrics()
    assert first["grad_norm"] > 0.1
    assert second["grad_norm"] > 0.1


def _torchrun(images: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The train command on two ranks, as a user starts it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "tests.engine.toy_command", "--method", "toy", "--model", "small", "--data", str(images)]
    common = ["--out", str(out), "--device", "cpu", "--workers", "0", "--log-every", "1", "--val", "none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command, *common, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
