"""What holds for the engine's toy method holds for MaskEmbed on the demo's backbone and scenes."""

from __future__ import annotations

from pathlib import Path

import pytest

from locfast.config.base import TrainConfig
from locfast.config.maskembed import MaskEmbedConfig
from locfast.config.registry import make_config
from locfast.engine.run import train
from locfast.errors import UserError
from tests.engine.processes import finish, kill_when, start, start_ranks
from tests.engine.test_loss_curve import RANKS_AGREE
from tests.engine.toy import losses


def _config(out: Path, **fields: object) -> TrainConfig:
    few = {"data": "demo:12", "val": "none", "batch_size": 4, "steps": 4, "save_every": 1, "log_every": 1}
    return make_config("maskembed", out=str(out), device="cpu", workers=0, **{**few, **fields})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return losses(train(_config(tmp_path_factory.mktemp("maskembed") / "run")))


def test_maskembed_gives_the_same_curve_on_two_ranks_and_in_two_rounds(alone, tmp_path):
    assert finish(*start_ranks(_config(tmp_path / "two"), tmp_path / "out", 2)) == [0, 0]
    train(_config(tmp_path / "rounds", micro_batch=2))
    assert len(alone) == 4
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=RANKS_AGREE)
    assert losses(tmp_path / "rounds") == pytest.approx(alone, rel=RANKS_AGREE)


def test_maskembed_killed_and_resumed_repeats_the_curve_bit_for_bit(alone, tmp_path):
    run = tmp_path / "run"
    process = start(_config(run), tmp_path / "out")
    assert kill_when(process, lambda: len(losses(run)) >= 2)
    assert 2 <= len(losses(run)) < 4
    train(_config(run, resume=True))
    assert losses(run) == alone


FP8 = MaskEmbedConfig(teacher_precision="fp8")


@pytest.fixture(scope="module")
def alone_in_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(_config(tmp_path_factory.mktemp("fp8") / "run", maskembed=FP8))


def test_an_fp8_teacher_changes_the_curve_and_saves_the_same_frozen_weights(alone, alone_in_fp8, tmp_path):
    curve = losses(alone_in_fp8)
    assert curve != alone and curve == pytest.approx(alone, rel=0.02)  # its targets are 1.9 % off, as distances add
    plain = train(_config(tmp_path / "plain", steps=1))
    frozen = "checkpoints/frozen.safetensors"
    assert (alone_in_fp8 / frozen).read_bytes() == (plain / frozen).read_bytes()


def test_a_run_with_an_fp8_teacher_killed_and_resumed_repeats_the_curve_bit_for_bit(alone_in_fp8, tmp_path):
    run = tmp_path / "run"
    process = start(_config(run, maskembed=FP8), tmp_path / "out")
    assert kill_when(process, lambda: len(losses(run)) >= 2)
    train(_config(run, resume=True, maskembed=FP8))
    assert losses(run) == losses(alone_in_fp8)


def test_an_fp8_teacher_gives_the_same_curve_on_two_ranks(alone_in_fp8, tmp_path):
    assert finish(*start_ranks(_config(tmp_path / "two", maskembed=FP8), tmp_path / "out", 2)) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(alone_in_fp8), rel=RANKS_AGREE)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kernels": "triton"}, "softcap_attention: --kernels triton was asked for, .*needs a CUDA device"),
        (
            {"kernels": "triton", "maskembed": MaskEmbedConfig(softcap=None)},
            "mask_embeddings: --kernels triton was asked for, .*needs a CUDA device",
        ),
        ({"maskembed": MaskEmbedConfig(uncapped_attention="flash-attn")}, "flash-attn was asked for, .*CUDA devices"),
        ({"image_size": 65}, "--image-size 65: demo has patches of"),
    ],
    ids=["triton", "triton without a cap", "flash-attn", "image size"],
)
def test_what_cannot_run_here_is_told_before_there_is_a_run_folder(fields, told, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the test session runs Triton's kernels on the CPU
    with pytest.raises(UserError, match=told):
        train(_config(tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


def test_a_kernel_that_the_environment_names_is_checked_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("LOCFAST_KERNELS", "triton")
    with pytest.raises(UserError, match="LOCFAST_KERNELS=triton was asked for"):
        train(_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
