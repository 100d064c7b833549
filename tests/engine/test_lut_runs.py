"""What holds for the engine's toy method holds for LUT, whose momentum encoder and batch norm have a state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locfast.config.base import TrainConfig
from locfast.config.lut import LUTConfig, LUTOptim
from locfast.config.registry import make_config
from locfast.engine.run import train
from locfast.engine.run_folder import RunFolder
from locfast.errors import UserError
from tests.engine.processes import finish, kill_when, start, start_ranks
from tests.engine.test_loss_curve import RANKS_AGREE
from tests.engine.toy import losses

STEPS = 20
SMALL = {"head_width": 64, "decoder_depth": 1, "decoder_width": 32, "decoder_heads": 4}
FORMS = {
    "paper": LUTConfig(**SMALL, optim=LUTOptim(warmup_epochs=0)),
    "reference": LUTConfig(**SMALL, optim=LUTOptim(warmup_epochs=0), form="reference", crop="random_resized"),
    "info_nce": LUTConfig(**SMALL, optim=LUTOptim(warmup_epochs=0), distance="info_nce", steer="all"),
}


def _config(out: Path, form: str = "paper", **fields: object) -> TrainConfig:
    few = {"data": "demo:24", "val": "none", "batch_size": 16, "steps": STEPS, "save_every": 1, "log_every": 1}
    settings = {"device": "cpu", "workers": 0, "image_size": 32, "lr": 5e-4, "lut": FORMS[form], **few, **fields}
    return make_config("lut", out=str(out), **settings)


def _state(run: Path) -> dict[str, torch.Tensor]:
    """Everything of the last checkpoint that training moves."""
    last = max(folder for folder in (run / "checkpoints").iterdir() if folder.name.startswith("step-"))
    return {
        f"{file.stem}.{name}": value for file in last.glob("*.safetensors") for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lut")
    return {form: train(_config(folder / form, form)) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_lut_gives_the_same_curve_on_two_ranks(form, alone, tmp_path):
    assert finish(*start_ranks(_config(tmp_path / "two", form), tmp_path / "out", 2)) == [0, 0]
    one, two = (RunFolder(run).read_metrics() for run in (alone[form], tmp_path / "two"))
    assert len(one) == STEPS
    for name in ("loss", "loss/reconstruction", "loss/context"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=RANKS_AGREE)
    ours, theirs = _state(alone[form]), _state(tmp_path / "two")
    statistics = [name for name in ours if "running" in name]
    assert len(statistics) == 6 and ours.keys() == theirs.keys()  # head, predictor, and the momentum encoder's head
    for name in statistics:
        # a mean near zero has no relative error: against the statistics' own size
        gap = (ours[name] - theirs[name]).abs().max() / ours[name].abs().max()
        assert gap < 100 * RANKS_AGREE, name


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_lut_killed_and_resumed_repeats_curve_and_momentum_encoder_bit_for_bit(form, alone, tmp_path):
    run = tmp_path / "run"
    process = start(_config(run, form), tmp_path / "out")
    assert kill_when(process, lambda: len(losses(run)) >= 6)
    assert 6 <= len(losses(run)) < STEPS
    train(_config(run, form, resume=True))
    assert losses(run) == losses(alone[form])
    ours, theirs = _state(alone[form]), _state(run)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    followed = [name for name in ours if name.startswith("model.momentum.")]
    assert any(name.endswith("running_var") for name in followed)
    start_weights = {name: value for name, value in ours.items() if name in followed and "qkv.weight" in name}
    assert start_weights and all(
        not torch.equal(value, ours[name.replace("model.momentum.", "model.autoencoder.")])
        for name, value in start_weights.items()
    )


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(alone, tmp_path):
    assert losses(train(_config(tmp_path / "same"))) == losses(alone["paper"])
    other = losses(train(_config(tmp_path / "other", seed=1)))
    assert all(value != losses(alone["paper"])[step] for step, value in other.items())


def test_under_accumulation_the_log_says_what_batch_norm_sees(alone, tmp_path):
    run = train(_config(tmp_path / "rounds", micro_batch=4))
    found = re.findall(
        r"batch norm in the heads is per micro-batch: it sees (\d+) of the (\d+) images",
        (run / "train.log").read_text(),
    )
    assert found == [("4", "16")]
    assert "batch norm" not in (alone["paper"] / "train.log").read_text()
    whole, rounds = losses(alone["paper"]), losses(run)
    assert rounds[1] == pytest.approx(whole[1], rel=0.1) and rounds[1] != pytest.approx(whole[1], rel=RANKS_AGREE)


def test_held_out_losses_are_the_same_on_one_and_two_ranks(tmp_path):
    fields = {"val": "demo:13", "steps": 3}
    train(_config(tmp_path / "one", **fields))
    assert finish(*start_ranks(_config(tmp_path / "two", **fields), tmp_path / "out", 2)) == [0, 0]
    one, two = (
        [line for line in RunFolder(tmp_path / name).read_metrics() if "val/loss" in line] for name in ("one", "two")
    )
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two, strict=True):
        for name in ("val/loss", "val/loss/reconstruction", "val/loss/context"):
            assert theirs[name] == pytest.approx(ours[name], rel=RANKS_AGREE)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"batch_size": 1}, "two images at a time"),
        ({"micro_batch": 1}, "Use --micro-batch 2 or more"),
        ({"lut": LUTConfig(mask_ratio=0.99)}, "--lut.mask-ratio 0.99 leaves 0 of 16 places visible"),
        ({"lut": LUTConfig(mask_unit=3)}, "do not tile the 4 x 4 patches of demo"),
        ({"kernels": "triton"}, "reconstruction_loss: --kernels triton was asked for, .*needs a CUDA device"),
        ({"image_size": 65}, "--image-size 65: demo has patches of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_run_is_told_before_there_is_a_run_folder(fields, told, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the test session runs Triton's kernels on the CPU
    with pytest.raises(UserError, match=told):
        train(_config(tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["paper", "info_nce"])
def test_a_step_that_is_not_finite_leaves_statistics_and_momentum_encoder_as_they_were(form, tmp_path):
    """The step's forward pass has put NaN into the running statistics by then, and images are tried one by one."""
    run, ranks = tmp_path / "run", start_ranks(_config(tmp_path / "run", form, lr=1e25), tmp_path / "out", 2)
    assert finish(*ranks) == [2, 2]
    told = (tmp_path / "out.0").read_text()
    assert re.search(r"Step 2 is not finite: loss nan.*which are not finite alone either", told.replace("\n", " "))
    saved = {file.name: load_file(file) for file in (run / "nonfinite" / "step-00000001").glob("*.safetensors")}
    before = {file.name: load_file(file) for file in (run / "checkpoints" / "step-00000001").glob("*.safetensors")}
    assert saved.keys() == before.keys() and any(name.endswith("running_mean") for name in saved["model.safetensors"])
    for kind, tensors in before.items():
        assert [name for name in tensors if not torch.equal(tensors[name], saved[kind][name])] == []


def test_resuming_with_another_form_is_refused(alone, tmp_path):
    run = train(_config(tmp_path / "run", steps=2))
    with pytest.raises(UserError, match="lut.form was paper, now reference"):
        train(_config(run, "reference", steps=2, resume=True))


def test_an_export_is_a_plain_vit_with_fixed_positions(alone, tmp_path):
    import timm

    from locfast.export import export

    export(alone["paper"], tmp_path / "exported", None)
    model = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True)
    state = _state(alone["paper"])
    assert torch.equal(
        model.blocks[0].attn.qkv.weight, state["model.autoencoder.encoder.model.blocks.0.attn.qkv.weight"]
    )
    assert model.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]
    assert not model.pos_embed[0, 0].any()
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "derive from no others" in card and "| architecture, from random weights |" in card
    assert "MaskEmbed" not in card and "base model" not in card
