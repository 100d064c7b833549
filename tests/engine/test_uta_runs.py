"""What holds for the engine's toy method holds for UTA on the demo's backbone and scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locfast.config.base import TrainConfig
from locfast.config.registry import make_config
from locfast.config.uta import UTAConfig, UTAOptim
from locfast.engine.run import train
from locfast.engine.run_folder import load_method
from locfast.errors import UserError
from locfast.subject import open_start
from tests.engine.processes import finish, kill_when, start, start_ranks
from tests.engine.test_loss_curve import RANKS_AGREE
from tests.engine.toy import losses

UTA = UTAConfig(teacher="demo", projection="none", drop_path=0.1)


def _config(out: Path, **fields: object) -> TrainConfig:
    few = {"data": "demo:12", "val": "none", "batch_size": 4, "steps": 20, "save_every": 5, "log_every": 1}
    return make_config("uta", **{"out": str(out), "device": "cpu", "workers": 0, "uta": UTA, **few, **fields})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(_config(tmp_path_factory.mktemp("uta") / "run"))


def test_uta_gives_the_same_curve_again_and_another_with_another_seed(alone, tmp_path):
    assert losses(train(_config(tmp_path / "again"))) == losses(alone)
    assert losses(train(_config(tmp_path / "seed", seed=1))) != losses(alone)


def test_uta_gives_the_same_curve_on_two_ranks_and_in_two_rounds(tmp_path):
    """Without drop path, which draws for a micro-batch and not for a sample."""
    plain = {"uta": UTAConfig(teacher="demo", projection="none")}
    curve = losses(train(_config(tmp_path / "one", **plain)))
    assert finish(*start_ranks(_config(tmp_path / "two", **plain), tmp_path / "out", 2)) == [0, 0]
    train(_config(tmp_path / "rounds", micro_batch=2, **plain))
    assert len(curve) == 20
    assert losses(tmp_path / "two") == pytest.approx(curve, rel=RANKS_AGREE)
    assert losses(tmp_path / "rounds") == pytest.approx(curve, rel=RANKS_AGREE)


def test_uta_killed_and_resumed_repeats_the_curve_bit_for_bit(alone, tmp_path):
    run = tmp_path / "run"
    process = start(_config(run), tmp_path / "out")
    assert kill_when(process, lambda: len(losses(run)) >= 7)
    assert 7 <= len(losses(run)) < 20
    train(_config(run, resume=True))
    assert losses(run) == losses(alone)


def test_the_teacher_never_changes_and_the_student_does(alone):
    method = load_method(alone)
    fresh = load_method(train(_config(alone.parent / "short", steps=1)))
    for name, tensor in method.teacher.state_dict().items():
        assert tensor.equal(fresh.teacher.state_dict()[name]), name
    assert not method.student.backbone.blocks[0].norm1.bias.equal(fresh.student.backbone.blocks[0].norm1.bias)
    saved = load_file(next((alone / "checkpoints").glob("step-*20")) / "model.safetensors")
    assert not any(name.startswith("teacher.") for name in saved)


def test_bad_input_is_told_before_there_is_a_run_folder(tmp_path):
    with pytest.raises(UserError, match="none was named"):
        train(_config(tmp_path / "run", uta=UTAConfig()))
    with pytest.raises(UserError, match="tokens are aligned place by place"):
        train(_config(tmp_path / "run", image_size=64))
    assert not (tmp_path / "run").exists()


def test_a_run_from_scratch_is_set_against_its_own_first_weights(alone):
    start, made = open_start(str(alone)), load_method(train(_config(alone.parent / "one", steps=1, lr=1e-30)))
    assert start.name == "demo (random weights)"
    own = made.artifacts()["backbone"].state_dict()
    for name, tensor in start.backbone.state_dict().items():
        assert torch.allclose(tensor, own[name], atol=1e-7), name
    assert (start.backbone.mean, start.backbone.std) == (made.teacher.mean, made.teacher.std)


def test_a_warm_up_as_long_as_the_run_is_told(alone, tmp_path):
    told = "the warm-up of 50 epochs is as long as the run"
    long = UTAConfig(teacher="demo", projection="none", optim=UTAOptim(warmup_epochs=50))
    assert told in " ".join((train(_config(tmp_path / "run", steps=1, uta=long)) / "train.log").read_text().split())
    assert "as long as the run" not in (alone / "train.log").read_text()


@pytest.mark.parametrize("objective", ["mim", "uta_mim", "distillation"])
def test_other_objectives_resume_and_agree_over_ranks_too(objective, tmp_path):
    own = {"uta": UTAConfig(teacher="demo", projection="none", objective=objective), "steps": 4, "save_every": 2}
    curve = losses(train(_config(tmp_path / "one", **own)))
    assert finish(*start_ranks(_config(tmp_path / "two", **own), tmp_path / "out", 2)) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(curve, rel=RANKS_AGREE)
    run = tmp_path / "killed"
    process = start(_config(run, **own), tmp_path / "killed.out")
    assert kill_when(process, lambda: len(losses(run)) >= 2)
    train(_config(run, resume=True, **own))
    assert losses(run) == curve
