"""A loss or gradient that is not finite stops the run, names the images, and leaves what repeats the step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from locfast.engine import checkpoint
from locfast.engine.run import train
from locfast.errors import UserError
from tests.engine.processes import finish, start_ranks
from tests.engine.toy import ToyConfig, losses, toy_config

POISONED = 11
SETTINGS: dict[str, object] = {}


def _stopped(images: Path, run: Path, **toy: object) -> tuple[str, Path]:
    """A run that meets the poisoned image in its first epoch: its message, and where the step was saved."""
    with pytest.raises(UserError, match="is not finite") as caught:
        train(toy_config(images, run, ToyConfig(poison=POISONED, **toy), steps=6, **SETTINGS))
    return str(caught.value), next((run / "nonfinite").glob("step-*"))


@pytest.mark.parametrize("gradient", [False, True])
def test_a_poisoned_image_stops_the_run_and_is_named(images, tmp_path, gradient):
    message, saved = _stopped(images, tmp_path / "run", poison_gradient=gradient)
    assert f"Image indices {POISONED} " in message
    assert "011.jpg" in message
    assert str(saved) in message
    record = json.loads((saved / "state.json").read_text())["nonfinite"]
    assert record["alone"] == [POISONED]
    assert POISONED in record["index"]
    assert len(record["position"]) == len(record["index"]) == len(record["epoch"]) == 8
    assert "is not finite" in (tmp_path / "run/train.log").read_text()


def test_the_saved_weights_are_those_before_the_step(images, tmp_path):
    _, saved = _stopped(images, tmp_path / "run")
    found = checkpoint.read(saved)
    sound = train(toy_config(images, tmp_path / "sound", steps=6, save_every=1))
    kept = checkpoint.read(checkpoint.step_folder(sound / "checkpoints", found.step)) if found.step > 3 else None
    assert all(bool(t.isfinite().all()) for name in ("model", "optimizer") for t in found.tensors(name).values())
    curve = losses(tmp_path / "run")
    assert curve == {step: loss for step, loss in losses(sound).items() if step <= found.step}
    if kept is not None:
        assert all(torch.equal(a, kept.tensors("model")[name]) for name, a in found.tensors("model").items())


def test_the_saved_folder_repeats_the_step_when_moved_to_the_checkpoints(images, tmp_path):
    run = tmp_path / "run"
    message, saved = _stopped(images, run)
    shutil.rmtree(run / "checkpoints" / saved.name, ignore_errors=True)
    shutil.move(saved, run / "checkpoints" / saved.name)
    with pytest.raises(UserError, match="is not finite") as again:
        train(toy_config(images, run, ToyConfig(poison=POISONED), steps=6, resume=True))
    assert str(again.value) == message


def test_two_ranks_stop_together_and_name_the_image(images, tmp_path):
    config = toy_config(images, tmp_path / "run", ToyConfig(poison=POISONED), steps=6, micro_batch=2)
    assert finish(*start_ranks(config, tmp_path / "out", 2)) == [2, 2]
    told = (tmp_path / "out.0").read_text()
    assert f"Image indices {POISONED} " in told
    assert "Traceback" not in told + (tmp_path / "out.1").read_text()
