"""Killed, torn and moved runs go on as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from pathlib import Path

import pytest

from locfast.engine import optim
from locfast.engine.run import train
from locfast.engine.run_folder import RunFolder
from locfast.errors import UserError
from tests.engine.conftest import SETTINGS
from tests.engine.processes import finish, kill_when, start, start_ranks
from tests.engine.toy import ToyConfig, losses, toy_config


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with SETTINGS that was killed after step 14: checkpoints of the steps 4, 8 and 12."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    process = start(toy_config(images, run, **SETTINGS), run.with_suffix(".out"))
    assert kill_when(process, lambda: len(losses(run)) >= 14)
    for later in run.glob("checkpoints/step-*"):
        if later.name > "step-00000012":  # the kill came late: as if it had come in time
            shutil.rmtree(later)
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_a_run_killed_at_random_moments_repeats_the_unbroken_curve_bit_for_bit(images, unbroken, tmp_path):
    run, chance, kills = tmp_path / "run", random.Random(0), 0
    for attempt in range(20):
        process = start(toy_config(images, run, resume=attempt > 0, **SETTINGS), tmp_path / "out")
        at = len(losses(run)) + chance.randrange(3, 13)
        if not kill_when(process, lambda at=at: len(losses(run)) >= at):
            assert process.exitcode == 0, (tmp_path / "out").read_text()
            break
        kills += 1
    assert kills >= 2
    assert losses(run) == unbroken


def test_a_run_killed_inside_a_save_repeats_the_unbroken_curve_bit_for_bit(images, unbroken, tmp_path):
    run = tmp_path / "run"
    settings = {**SETTINGS, "save_every": 2}
    for attempt in range(3):
        process = start(toy_config(images, run, resume=attempt > 0, **settings), tmp_path / "out")
        kill_when(process, lambda: len(losses(run)) >= 6 * (attempt + 1) and any(_half_written(run)))  # noqa: B023
    train(toy_config(images, run, resume=True, **settings))
    assert losses(run) == unbroken
    assert not list(_half_written(run))


def _half_written(run: Path):
    return run.glob("checkpoints/.partial-*")


@pytest.mark.slow
def test_fifty_kills_at_random_times_change_no_bit(images, tmp_path):
    settings = {**SETTINGS, "steps": 400, "save_every": 3}
    whole = losses(train(toy_config(images, tmp_path / "whole", **settings)))
    run, chance = tmp_path / "run", random.Random(1)
    for _ in range(50):
        process = start(toy_config(images, run, resume=True, **settings), tmp_path / "out")
        process.join(0.5 + chance.random())
        process.kill()
        process.join()
    train(toy_config(images, run, resume=True, **settings))
    assert losses(run) == whole


def test_a_stopped_run_has_no_pickle_and_three_checkpoints(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.name != ".lock"} <= {
        ".safetensors",
        ".json",
        ".jsonl",
        ".yaml",
        ".log",
    }
    assert len(list(run.glob("checkpoints/step-*"))) == 3


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [_truncate, _flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_taken(images, unbroken, run, harm, name):
    if harm is _flip_a_bit and name == "state.json":
        (run / "checkpoints/step-00000012" / name).write_text("{}")
    else:
        harm(run / "checkpoints/step-00000012" / name)
    train(toy_config(images, run, resume=True, **SETTINGS))
    assert losses(run) == unbroken
    log = (run / "train.log").read_text()
    assert "Damaged checkpoint" in log
    assert f"step-00000012: {name}" in log
    assert "Resuming from" in log
    assert "after step 8" in log
    assert (run / "checkpoints/damaged-step-00000012").is_dir()


def test_a_run_without_any_complete_checkpoint_starts_again(images, unbroken, run):
    for state in run.glob("checkpoints/step-*/state.json"):
        state.unlink()
    train(toy_config(images, run, resume=True, **SETTINGS))
    assert losses(run) == unbroken
    assert "starting at step 0" in (run / "train.log").read_text()


def test_damaged_frozen_weights_come_from_the_pretrained_model_again(images, unbroken, run):
    _flip_a_bit(run / "checkpoints/frozen.safetensors")
    train(toy_config(images, run, resume=True, **SETTINGS))
    assert losses(run) == unbroken
    assert "Damaged frozen weights" in (run / "train.log").read_text()


def test_another_number_of_ranks_goes_on_with_the_run(images, unbroken, run, tmp_path):
    settings = {**SETTINGS, "toy": ToyConfig()}
    whole = losses(train(toy_config(images, tmp_path / "whole", **settings)))
    one = tmp_path / "one"
    process = start(toy_config(images, one, **settings), tmp_path / "out")
    kill_when(process, lambda: (one / "checkpoints/step-00000008").is_dir())
    codes = finish(*start_ranks(toy_config(images, one, resume=True, **settings), tmp_path / "ranks", 2))
    assert codes == [0, 0], (tmp_path / "ranks.0").read_text()
    # sums over ranks are added in another order: fp32 rounding, grown over 16 steps
    assert losses(one) == pytest.approx(whole, rel=1e-4)


def test_a_finished_run_is_left_as_it_is(images, tmp_path):
    config = toy_config(images, tmp_path / "run", steps=2)
    train(config)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    train(toy_config(images, tmp_path / "run", steps=2, resume=True))
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "large"}, "model was small, now large"),
        ({"seed": 4}, "seed was 3, now 4"),
        ({"lr": 1.0}, "lr was 0.003, now 1.0"),
        ({"steps": 30}, "steps was 24, now 30"),
        ({"toy": ToyConfig(dropout=0.2)}, "toy.dropout was 0.1, now 0.2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(images, run, changes, told):
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=told):
        train(toy_config(images, run, resume=True, **{**SETTINGS, **changes}))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_says_how_and_not_what_may_change_on_resume(images, unbroken, run):
    train(toy_config(images, run, resume=True, **{**SETTINGS, "toy": ToyConfig(dropout=0.1, pieces=2)}))
    assert losses(run) == unbroken


@pytest.mark.parametrize("to", [("cuda", "cpu"), ("cuda",)], ids=["fused from loops", "loops from fused"])
def test_a_checkpoint_of_another_form_of_the_optimiser_is_taken(images, tmp_path, monkeypatch, to):
    """A GPU's run goes on on a CPU and the other way: the form is of where it runs, the state is the same."""
    short = {**SETTINGS, "steps": 6, "save_every": 2}
    run = tmp_path / "run"
    monkeypatch.setattr(optim, "FUSED_ON", ("cuda",) if "cpu" in to else ("cuda", "cpu"))
    train(toy_config(images, run, **short))
    before = losses(run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    monkeypatch.setattr(optim, "FUSED_ON", to)
    train(toy_config(images, run, resume=True, **short))
    assert losses(run) == pytest.approx(before, rel=1e-5)


def test_a_checkpoint_from_before_a_field_existed_did_what_its_default_does(images, unbroken, run):
    for file in run.glob("checkpoints/step-*/state.json"):
        state = json.loads(file.read_text())
        del state["settings"]["toy.poison_gradient"]
        file.write_text(json.dumps(state))
    train(toy_config(images, run, resume=True, **SETTINGS))
    assert losses(run) == unbroken


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory) -> Path:
    """The images of the folder in two shards."""
    out, files = tmp_path_factory.mktemp("shards"), sorted(images.iterdir())
    for shard in range(2):
        with tarfile.open(out / f"{shard}.tar", "w") as tar:
            for file in files[shard::2]:
                tar.add(file, arcname=file.name)
    return out


def test_a_run_on_shards_takes_blocks_and_goes_on_with_them(shards, tmp_path):
    settings = {"steps": 8, "save_every": 4}
    run = train(toy_config(shards, tmp_path / "run", **settings))
    whole = losses(run)
    assert "neighbours from 2 shards" in (run / "train.log").read_text()
    assert "shuffle: blocks" in (run / "config.yaml").read_text()
    shutil.rmtree(run / "checkpoints/step-00000008")
    with pytest.raises(UserError, match="shuffle was blocks, now full"):
        train(toy_config(shards, run, resume=True, shuffle="full", **settings))
    train(toy_config(shards, run, resume=True, **settings))
    assert losses(run) == whole


def test_a_checkpoint_from_before_blocks_goes_on_with_the_full_order(shards, tmp_path):
    settings = {"steps": 8, "save_every": 4}
    run = train(toy_config(shards, tmp_path / "run", shuffle="full", **settings))
    whole = losses(run)
    shutil.rmtree(run / "checkpoints/step-00000008")
    for file in run.glob("checkpoints/step-*/state.json"):
        state = json.loads(file.read_text())
        del state["settings"]["shuffle"]
        file.write_text(json.dumps(state))
    with pytest.raises(UserError, match="shuffle was full, now blocks"):
        train(toy_config(shards, run, resume=True, shuffle="blocks", **settings))
    train(toy_config(shards, run, resume=True, **settings))
    assert losses(run) == whole


def test_resume_counts_on_unreadable_files(images, tmp_path):
    data = Path(shutil.copytree(images, tmp_path / "data"))
    for name in ("003.jpg", "017.jpg", "031.jpg"):
        (data / name).write_bytes(b"not an image")
    settings = {"steps": 12, "save_every": 6, "max_bad": 1.0}
    run = train(toy_config(data, tmp_path / "whole", **settings))
    state = (run / "checkpoints/step-00000012/state.json").read_text()
    broken = train(toy_config(data, tmp_path / "broken", **settings))
    shutil.rmtree(broken / "checkpoints/step-00000012")
    train(toy_config(data, broken, resume=True, **settings))
    assert (broken / "checkpoints/step-00000012/state.json").read_text() == state
    assert losses(broken) == losses(run)
    assert (run / "train.log").read_text().count("003.jpg") == 1


@pytest.mark.parametrize("spoilt", [b'{"step": 15, "lo', b"\0" * 512, b'\xff\xfe{"step"', b"3\n{}\n"])
def test_metrics_that_a_kill_or_a_power_cut_spoilt_are_written_again(images, unbroken, run, spoilt):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(spoilt)
    train(toy_config(images, run, resume=True, **SETTINGS))
    assert losses(run) == unbroken
    assert [entry["step"] for entry in RunFolder(run).read_metrics()] == list(range(1, 25))
