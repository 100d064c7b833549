"""What holds for the engine's toy method holds for contrastive fine-tuning, whose loss couples a whole global batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from locfast.engine.run import train
from locfast.engine.run_folder import RunFolder
from locfast.errors import UserError
from locfast.export import export
from locfast.methods.clip import Clip
from locfast.models.image_tower import load_image_tower
from locfast.models.joint import JointTower
from locfast.models.text_encoder import TextEncoder
from locfast.subject import open_subject
from tests.engine.processes import finish, kill_when, start, start_ranks
from tests.engine.test_loss_curve import RANKS_AGREE, STEPS
from tests.engine.toy import losses
from tests.methods.pairs import clip_config, tiny_clip, write_pairs

pytest.importorskip("open_clip")

ROOT = Path(__file__).parents[2]
OWN = {"learn_temperature": True, "temperature": 0.1, "drop_path": 0.2, "crop": "random_resized"}
"""All that has state or draws; at a temperature of 0.01, rounding grows faster than 20 steps allow for."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Image-text pairs and a small model for them."""
    folder = tmp_path_factory.mktemp("clip")
    return {"data": write_pairs(folder / "pairs"), "text": tiny_clip(folder)}


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(clip_config(**given, out=tmp_path_factory.mktemp("alone") / "run", clip=OWN, steps=STEPS))


def curves(run: Path) -> dict[str, list[float]]:
    entries = RunFolder(run).read_metrics()
    return {name: [entry[name] for entry in entries] for name in ("loss", "grad_norm", "temperature")}


def test_pairs_are_told_apart_after_a_few_epochs_and_the_learned_temperature_moves(given, tmp_path):
    own = {"learn_temperature": True, "temperature": 0.1, "layer_decay": 1.0}
    curve = curves(train(clip_config(**given, out=tmp_path / "run", clip=own, steps=90, lr=1e-2)))
    assert sum(curve["loss"][:3]) / 3 > 2.0  # log 8, and more
    assert sum(curve["loss"][-6:]) / 6 < 1.0
    assert curve["temperature"][0] == pytest.approx(0.1)
    assert curve["temperature"][-1] < 0.099


def test_the_same_seed_gives_the_same_curve_bit_for_bit_and_another_seed_another(given, alone, tmp_path):
    again, other = (clip_config(**given, out=tmp_path / str(s), clip=OWN, steps=STEPS, seed=s) for s in (0, 1))
    assert curves(train(again)) == curves(alone)
    assert all(a != b for a, b in zip(curves(train(other))["loss"], curves(alone)["loss"], strict=True))


def test_a_run_killed_and_resumed_repeats_the_curve_bit_for_bit(given, alone, tmp_path):
    settings = {"clip": OWN, "steps": STEPS, "save_every": 2, "micro_batch": 4}
    whole = train(clip_config(**given, out=tmp_path / "whole", **settings))
    run = tmp_path / "run"
    process = start(clip_config(**given, out=run, **settings), tmp_path / "out")
    assert kill_when(process, lambda: len(losses(run)) >= 7)
    assert 7 <= len(losses(run)) < STEPS
    train(clip_config(**given, out=run, resume=True, **settings))
    assert curves(run) == curves(whole)


@pytest.fixture(scope="module")
def undropped(given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without stochastic depth, whose draws follow micro-batches, and so ranks."""
    settings = {"clip": {**OWN, "drop_path": 0.0}, "steps": STEPS}
    return train(clip_config(**given, out=tmp_path_factory.mktemp("undropped") / "run", **settings))


def agree(run: Path, other: Path) -> None:
    ours, theirs = curves(run), curves(other)
    assert len(ours["loss"]) == STEPS
    for name, values in ours.items():
        assert values == pytest.approx(theirs[name], rel=RANKS_AGREE), name


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_keep_the_whole_batch_as_negatives(given, undropped, tmp_path, micro_batch):
    settings = {"clip": {**OWN, "drop_path": 0.0}, "steps": STEPS, "micro_batch": micro_batch}
    agree(train(clip_config(**given, out=tmp_path / "run", **settings)), undropped)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_two_ranks_give_the_curve_of_one_and_its_gradient_norms(given, undropped, tmp_path, micro_batch):
    settings = {"clip": {**OWN, "drop_path": 0.0}, "steps": STEPS, "micro_batch": micro_batch}
    config = clip_config(**given, out=tmp_path / "two", **settings)
    assert finish(*start_ranks(config, tmp_path / "out", 2)) == [0, 0], (tmp_path / "out.0").read_text()
    agree(tmp_path / "two", undropped)


def test_two_ranks_agree_at_a_fixed_temperature_with_a_frozen_text_tower_and_their_uneven_held_out_pairs(
    given, tmp_path
):
    own = {"freeze_text": True, "temperature": 0.1}
    held = write_pairs(tmp_path / "held", count=10)
    settings: dict[str, Any] = {"clip": own, "steps": 4, "val": str(held), "micro_batch": 2}
    one = train(clip_config(**given, out=tmp_path / "one", **settings))
    config = clip_config(**given, out=tmp_path / "two", **settings)
    assert finish(*start_ranks(config, tmp_path / "out", 2)) == [0, 0], (tmp_path / "out.0").read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=RANKS_AGREE)
    assert sum("val/loss" in entry for entry in RunFolder(tmp_path / "two").read_metrics()) == 2  # an epoch, the end


@pytest.mark.parametrize(("micro_batch", "passes"), [(None, 1), (4, 2)])
def test_a_step_of_micro_batches_costs_two_forward_passes(given, tmp_path, monkeypatch, micro_batch, passes):
    seen = {"images": 0, "texts": 0}

    def counted(kind: type, function: str, name: str) -> None:
        plain = getattr(kind, function)

        def count(self: Any, x: torch.Tensor) -> torch.Tensor:
            seen[name] += len(x)
            return plain(self, x)

        monkeypatch.setattr(kind, function, count)

    counted(JointTower, "embed", "images")
    counted(TextEncoder, "forward", "texts")
    train(clip_config(**given, out=tmp_path / "run", steps=3, micro_batch=micro_batch))
    assert seen == {"images": 3 * 8 * passes, "texts": 3 * 8 * passes}


def test_an_export_brings_its_projection_to_the_next_run_and_both_towers_to_the_evaluation(given, tmp_path):
    run = train(clip_config(**given, out=tmp_path / "run", model="demo", steps=2))
    subject = open_subject(str(run))
    images = torch.randn(2, 3, *subject.backbone.image_size)
    embeddings = subject.embed(subject.backbone(images))
    assert embeddings.shape == (2, 24)
    assert subject.text.model == given["text"] and subject.text.tower is not None
    export(run, tmp_path / "timm", ema=None)
    plain = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(plain(images), embeddings, rtol=1e-4, atol=1e-4 * embeddings.abs().max().item())
    again = load_image_tower(str(tmp_path / "timm"), 24).eval()
    torch.testing.assert_close(again(images)[:, 0], embeddings, rtol=1e-4, atol=1e-4 * embeddings.abs().max().item())
    assert "optimiser: timm.optim.lamb.Lamb" in (run / "train.log").read_text()


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_of_a_batch_that_is_not_finite_as_a_whole_the_one_pair_at_fault_is_named(
    given, tmp_path, monkeypatch, micro_batch
):
    embed = Clip.embed

    def spoilt(self: Clip, batch: dict[str, Any], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, texts = embed(self, batch, tokens)
        return torch.where((batch["index"] == 5)[:, None], torch.nan, images), texts

    monkeypatch.setattr(Clip, "embed", spoilt)
    config = clip_config(**given, out=tmp_path / "run", steps=4, micro_batch=micro_batch)
    with pytest.raises(UserError, match=r"Image indices 5 \(.*pairs-0.tar/005\), which are not finite alone either"):
        train(config)


def without_cls(folder: Path) -> Path:
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, class_token=False, global_pool="avg")
    args = {"img_size": 32, "depth": 1, "class_token": False, "global_pool": "avg"}
    save_for_hf(model, str(folder), model_args=args, safe_serialization=True)
    return folder


def of_another_width(folder: Path) -> Path:
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=40)
    save_for_hf(model, str(folder), model_args={"img_size": 32, "depth": 1}, safe_serialization=True)
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda given, folder: {"data": write_pairs(folder / "bare", captioned=False)}, "has no text"),
        (lambda given, folder: {"model": str(without_cls(folder / "timm"))}, "needs a CLS token"),
        (lambda given, folder: {"model": str(of_another_width(folder / "timm"))}, "projects to 40 dimensions"),
        (lambda given, folder: {"text": "ViT-B-61"}, "--clip.text ViT-B-61: open_clip .* has no such model"),
        (lambda given, folder: {"clip": {"text_pretrained": "opennai"}}, "--clip.text-pretrained opennai: neither"),
        (lambda given, folder: {"text": tiny_clip(folder, "sigmoid")}, "has no CLS token with a linear projection"),
    ],
    ids=["no text", "no CLS", "another width", "no such tower", "no such weights", "attention pooling"],
)
def test_what_cannot_be_trained_is_told_in_one_message(given, tmp_path, make, told):
    config = clip_config(**{**given, "out": tmp_path / "run", **make(given, tmp_path)})
    assert finish(start(config, tmp_path / "out")) == [2]
    output = " ".join((tmp_path / "out").read_text().split())
    assert re.search(told, output), output
    assert "Traceback" not in output


def test_the_command_trains_and_is_told_of_a_shard_without_captions(given, tmp_path):
    def command(*flags: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "locfast.train", "--method", "clip", "--model", "open_clip"]
        own = ["--clip.text", given["text"], "--clip.text-pretrained", "none", "--val", "none", "--device", "cpu"]
        common = ["--workers", "0", "--batch-size", "8", "--steps", "2", "--lr", "1e-3"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*line, *own, *common, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )

    good = command("--data", str(given["data"]), "--out", str(tmp_path / "good"), "--clip.learn-temperature")
    assert good.returncode == 0, good.stderr
    assert len(curves(tmp_path / "good")["temperature"]) == 2
    assert "locfast" not in good.stderr  # as it would be if open_clip's messages had set up the root logger
    bare = write_pairs(tmp_path / "bare", captioned=False)
    bad = command("--data", str(bare), "--out", str(tmp_path / "bad"))
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
    assert "has no text" in " ".join(bad.stderr.split())
