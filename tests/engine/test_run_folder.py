"""Nothing is overwritten unasked, a full disk loses nothing, and a run folder holds all that rebuilds its method."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from locfast.cli import parse_train
from locfast.engine import checkpoint
from locfast.engine.run import train
from locfast.engine.run_folder import RunFolder, load_method
from locfast.errors import UserError
from tests.engine.processes import finish, start
from tests.engine.toy import losses, toy_config


@pytest.fixture(scope="module")
def done(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(toy_config(images, tmp_path_factory.mktemp("done") / "run", steps=5, save_every=1, ema=0.5))


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def test_an_existing_run_is_refused(images, run):
    with pytest.raises(UserError, match="a run is already there. Add --resume"):
        train(toy_config(images, run, steps=5))


def test_overwrite_replaces_a_run(images, run):
    train(toy_config(images, run, steps=2, overwrite=True))
    assert len(losses(run)) == 2
    assert [p.name for p in run.glob("checkpoints/step-*")] != []
    assert not (run / "checkpoints/step-00000005").exists()


def test_overwrite_keeps_the_old_run_when_the_new_one_cannot_start(images, run):
    before = losses(run)
    with pytest.raises(UserError):
        train(toy_config(images / "nowhere", run, overwrite=True))
    with pytest.raises(UserError, match="--micro-batch 3"):
        train(toy_config(images, run, overwrite=True, micro_batch=3))
    assert losses(run) == before


def test_a_folder_of_somebody_else_is_never_touched(images, tmp_path):
    (tmp_path / "thesis.txt").write_text("five years of work")
    (tmp_path / "config.yaml").write_text("method: another program's\n")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="not of a locfast run"):
            train(toy_config(images, tmp_path, **flags))
    assert (tmp_path / "thesis.txt").read_text() == "five years of work"


def test_resume_and_overwrite_contradict_each_other(images, run):
    with pytest.raises(UserError, match="give one of them"):
        train(toy_config(images, run, resume=True, overwrite=True))


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}])
def test_a_folder_in_which_another_process_trains_is_refused_until_that_is_killed(images, run, flags):
    code = (
        "import sys, pathlib\n"
        "from locfast.engine.lock import Lock\n"
        "lock = Lock(pathlib.Path(sys.argv[1]))\n"
        "lock.take()\n"
        "print(flush=True)\n"
        "input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    before = losses(run)
    with pytest.raises(UserError, match=f"process {other.pid} on .* is training there"):
        train(toy_config(images, run, steps=5, save_every=1, ema=0.5, **flags))
    assert losses(run) == before
    other.kill()
    other.communicate()
    train(toy_config(images, run, steps=5, save_every=1, ema=0.5, **flags))
    assert losses(run) == before


def test_ctrl_c_ends_a_run_and_its_workers_with_one_line(images, tmp_path):
    command = ["-m", "tests.engine.toy_command", "--method", "toy", "--model", "small", "--data", str(images)]
    flags = ["--device", "cpu", "--workers", "2", "--val", "none", "--steps", "100000", "--log-every", "1"]
    process = subprocess.Popen(
        [sys.executable, *command, *flags, "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a terminal sends Ctrl-C to the whole group, decoding processes too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
        text=True,
    )
    try:
        wait_until(lambda: len(losses(tmp_path / "run")) >= 5)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130
        assert told == "locfast: Stopped by Ctrl-C.\n"
        wait_until(lambda: not group_exists(process.pid))
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not so after {seconds} s"
        time.sleep(0.05)


def group_exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_run_folder_that_cannot_be_made_is_told(images, tmp_path, place):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=f"--out .*{place}: .*[Gg]ive a folder"):
        train(toy_config(images, tmp_path / place, steps=1))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a file system that takes no folder")
def test_a_run_folder_where_nobody_may_write_is_told(images):
    with pytest.raises(UserError, match="cannot make or write this folder"):
        train(toy_config(images, "/sys/kernel/locfast-run", steps=1))


def test_a_run_that_was_killed_while_it_made_its_folder_can_start_again(images, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".config.yaml"):
        (tmp_path / "run" / name).write_text("half")
    assert len(losses(train(toy_config(images, tmp_path / "run", steps=1)))) == 1


def test_the_last_three_checkpoints_are_kept(done):
    assert sorted(p.name for p in done.glob("checkpoints/step-*")) == [f"step-0000000{n}" for n in (3, 4, 5)]


def test_config_yaml_repeats_the_run(done, tmp_path):
    config = parse_train(["--config", str(done / "config.yaml"), "--out", str(tmp_path / "again")])
    assert losses(train(config)) == losses(done)


def test_a_method_is_rebuilt_with_its_plain_or_averaged_weights(done):
    newest, _ = checkpoint.newest(done / "checkpoints")
    plain, averaged = load_method(done, ema=False), load_method(done)
    assert torch.equal(plain.student[0].weight, newest.tensors("model")["student.0.weight"])
    assert torch.equal(averaged.student[0].weight, newest.tensors("ema")["student.0.weight"])
    assert not torch.equal(plain.student[0].weight, averaged.student[0].weight)
    assert torch.equal(plain.teacher.weight, averaged.teacher.weight)
    assert plain.scale != 1
    assert not plain.training


def test_averaged_weights_that_were_not_kept_are_refused(images, tmp_path):
    run = train(toy_config(images, tmp_path / "run", steps=1))
    with pytest.raises(UserError, match="train with --ema"):
        load_method(run, ema=True)
    with pytest.raises(UserError, match="not a run folder"):
        load_method(images)


def test_a_file_of_the_checkpoints_of_another_model_is_refused(images, run, tmp_path):
    other = train(toy_config(images, tmp_path / "other", model="large", steps=1))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    with pytest.raises(UserError, match="checkpoint of another model"):
        load_method(run)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of 140 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_with_a_message_and_the_run_goes_on_when_there_is_room(images, small_disk, tmp_path):
    settings = {"steps": 8, "save_every": 1}
    config = toy_config(images, small_disk / "run", **settings)
    assert finish(start(config, tmp_path / "out")) == [2]
    told = (tmp_path / "out").read_text()
    assert "the disk is full while writing" in told
    assert "--resume" in told
    assert "Traceback" not in told
    found, complaints = checkpoint.newest(small_disk / "run/checkpoints")
    assert found is not None
    assert complaints == []
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    train(toy_config(images, small_disk / "run", resume=True, **settings))
    assert losses(small_disk / "run") == losses(train(toy_config(images, tmp_path / "whole", **settings)))


def test_a_file_size_limit_ends_with_a_message_too(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint.save(tmp_path, 1, {"model": {"a": torch.zeros(10)}}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(Exception, match="File too large") as caught:
            checkpoint.save(tmp_path, 2, {"model": {"a": torch.zeros(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    from locfast.cli import no_room

    assert "file too large while writing" in (no_room(caught.value) or "")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_train_log_holds_what_was_said(done):
    log = (done / "train.log").read_text()
    for words in ("toy on small", "kernels:", "step 5/5", "images/s", "data wait", "saved", "done:"):
        assert words in log


def test_metrics_hold_full_precision(done):
    entries = RunFolder(done).read_metrics()
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5]
    assert all(len(repr(entry["loss"])) > 10 for entry in entries)
    assert {"lr", "grad_norm", "epoch", "images_per_second", "data_wait", "peak_memory"} <= entries[0].keys()
