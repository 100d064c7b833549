"""Unreadable files: training goes on past a few of every kind, and stops together and with a list at too many."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locfast.data.sources import ImageFolder
from locfast.engine import checkpoint
from locfast.engine.run import train
from locfast.engine.unreadable import SHOWN, SIGMAS, enough, too_many
from locfast.errors import UserError
from tests.engine.processes import finish, start_ranks
from tests.engine.toy import Toy, losses, toy_config

BAD = ("003.jpg", "017.jpg", "031.jpg", "044.jpg")
STEPS = {"steps": 12, "save_every": 6}  # two epochs of 48 images


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    """48 images, of which four are none: a share of 1/12."""
    root = Path(shutil.copytree(images, tmp_path / "data"))
    for name in BAD:
        (root / name).write_bytes(b"not an image")
    return root


def stopped(data: Path, run: Path, **settings: object) -> str:
    with pytest.raises(UserError, match="cannot be read") as caught:
        train(toy_config(data, run, **{**STEPS, **settings}))
    return str(caught.value)


def state(run: Path) -> dict:
    found, _ = checkpoint.newest(run / "checkpoints")
    return found.state if found else {"step": 0}


def test_too_many_unreadable_files_stop_the_run_with_a_list_of_them(data, tmp_path):
    run = tmp_path / "run"
    message = stopped(data, run, max_bad=0.07)
    assert "--max-bad 0.07: 4 of the 48 files" in message
    assert all(f"\n  {data / name}: not an image of a known format\n" in message for name in BAD)
    assert f"`--resume --out {run} --max-bad 0.2`" in message
    listed = [line.split("\t") for line in (run / "unreadable.txt").read_text().splitlines()]
    assert sorted(listed) == [[str(data / name), "not an image of a known format"] for name in BAD]
    assert message in (run / "train.log").read_text()
    assert max(losses(run)) == state(run)["step"] <= 6  # the first epoch shows all


def test_a_long_list_is_cut_in_the_message_and_whole_in_the_file(images, tmp_path):
    data = Path(shutil.copytree(images, tmp_path / "data"))
    for i in range(30):
        (data / f"{i:03}.jpg").write_bytes(b"")
    message = stopped(data, tmp_path / "run", max_bad=0.6)
    listed = (tmp_path / "run/unreadable.txt").read_text().splitlines()
    assert len(listed) > SHOWN
    assert message.count(": the file is empty") == SHOWN
    assert f"and {len(listed) - SHOWN} more" in message


@pytest.mark.parametrize(("share", "stops"), [(4 / 48, False), (3.9 / 48, True), (0, True), (1, False)])
def test_the_share_is_of_the_files_of_the_data_set(data, tmp_path, share, stops):
    run = tmp_path / "run"
    if stops:
        stopped(data, run, max_bad=share)
        assert share or len((run / "unreadable.txt").read_text().splitlines()) < 4  # those seen before the first step
    else:
        train(toy_config(data, run, max_bad=share, **STEPS))
        assert set(state(run)["data"]["names"]) == {str(data / name) for name in BAD}
        assert not (run / "unreadable.txt").exists()


def test_a_stopped_run_goes_on_with_a_larger_share_as_if_it_had_not_stopped(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "preparation_samples", 1)
    run = tmp_path / "run"
    whole = train(toy_config(data, tmp_path / "whole", max_bad=1.0, **STEPS))
    stopped(data, run, max_bad=0.03)
    before = state(run)
    assert 0 < before["step"] < 6
    again = stopped(data, run, max_bad=0.03, resume=True)
    assert f"{len(before['data']['names'])} of the 48" in again
    assert state(run) == before
    train(toy_config(data, run, max_bad=1.0, resume=True, **STEPS))
    assert losses(run) == losses(whole)
    assert state(run)["data"] == state(whole)["data"]


def test_two_ranks_stop_together_at_what_they_found_together(data, tmp_path):
    config = toy_config(data, tmp_path / "run", max_bad=3.5 / 48, micro_batch=4, log_every=2, **STEPS)
    assert finish(*start_ranks(config, tmp_path / "out", 2)) == [2, 2]
    told = [(tmp_path / f"out.{rank}").read_text() for rank in range(2)]
    assert "4 of the 48 files" in told[0]
    assert told[0].count("cannot read ") < 4  # what the first rank alone has found is within the limit
    assert "Traceback" not in told[0] + told[1]
    assert len((tmp_path / "run/unreadable.txt").read_text().splitlines()) == 4
    assert state(tmp_path / "run")["step"] in (2, 4, 6)  # where lines are due


def test_a_large_data_set_stops_early_and_only_beyond_chance():
    """Of 60 sources with exactly the allowed share none may stop within 20000 samples, and with five times as many all
    do within 1000. (Of 400 runs of 200000 samples at exactly the limit, three stopped; at four fifths of it none.)"""
    size, limit = 10**8, 0.01
    for seed in range(60):
        chance = np.random.default_rng(seed)
        for share, reads, stops in ((limit, 20000, False), (5 * limit, 1000, True)):
            files = (chance.random(reads) < share).cumsum()
            over = [too_many(int(n), size, read - int(n), limit) for read, n in enumerate(files, 1)]
            assert any(over) is stops, (seed, share)


def test_the_rule_at_its_ends():
    assert not too_many(0, 10, 0, 0.0)
    assert too_many(1, 10**9, 0, 0.0)
    assert not too_many(10**6, 10**6, 0, 1.0)
    assert too_many(11, 1000, 10**6, 0.01)
    assert not too_many(10, 1000, 10**6, 0.01)
    assert not too_many(9, 10**9, 0, 0.01)  # nine are within three sigma of none
    assert SIGMAS * 10**0.5 < 10


@pytest.mark.parametrize(("share", "wanted"), [(0.01, 0.02), (0.0625, 0.1), (0.3, 0.5), (0.9, 1.0), (1e-4, 2e-4)])
def test_the_share_to_type_is_round_and_leaves_room(share, wanted):
    assert enough(share) == wanted


@pytest.mark.parametrize("value", [-0.1, 1.5, 5])
def test_a_share_beyond_0_to_1_is_refused(value, tmp_path):
    with pytest.raises(UserError, match="--max-bad is a share"):
        toy_config(tmp_path, tmp_path / "run", max_bad=value)


@pytest.fixture
def may_not_read(monkeypatch):
    """Takes from the reader of this file the right to; root may read what its mode forbids, so it becomes nobody."""

    def forbid(path: Path) -> None:
        path.chmod(0)
        read = ImageFolder.read

        def reading(source, index):
            if os.geteuid() or source.name(index) != str(path):
                return read(source, index)
            os.seteuid(65534)
            try:
                return read(source, index)
            finally:
                os.seteuid(0)

        monkeypatch.setattr(ImageFolder, "read", reading)

    return forbid


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).convert("RGB").save(file, kind)
    return file.getvalue()


def named(run: Path) -> dict[str, str]:
    """What a finished run could not read. Every batch was whole, and every file is in the log once."""
    log, found = (run / "train.log").read_text(), state(run)["data"]
    assert all(log.count(f"cannot read {name} (") == 1 for name in found["names"])
    assert found["count"] >= len(found["names"])
    return {Path(name).name: why for name, why in found["names"].items()}


@pytest.fixture
def whole_batches(monkeypatch):
    """Every batch of a training step has its eight images."""
    sizes: list[int] = []
    draw = Toy.draw
    monkeypatch.setattr(Toy, "draw", lambda self, keys: sizes.append(len(keys)) or draw(self, keys))
    yield
    assert set(sizes[-12:]) == {8}


def test_files_damaged_in_every_way_are_replaced_and_named_once(images, tmp_path, may_not_read, whole_batches):
    data = Path(shutil.copytree(images, tmp_path / "data"))
    whole = encoded("JPEG")
    damage = {
        "cut.jpg": whole[: len(whole) // 2],
        "header.jpg": whole[:20],
        "corrupt.jpg": whole[:4] + bytes(300) + whole[304:],
        "empty.jpg": b"",
        "text.jpg": b"a text, and no picture\n" * 50,
        "half.png": encoded("PNG")[:200],
        "forbidden.jpg": whole,
    }
    for name, content in {**damage, "png.jpg": encoded("PNG"), "gif.jpg": encoded("GIF")}.items():
        (data / name).write_bytes(content)
    (data / "nowhere.jpg").symlink_to(data / "gone.jpg")
    may_not_read(data / "forbidden.jpg")
    run = train(toy_config(data, tmp_path / "run", max_bad=0.2, epochs=2.0))
    found = named(run)
    assert set(found) == {*damage, "nowhere.jpg"}  # an image of another kind than its name says is read
    assert found["forbidden.jpg"] == "Permission denied"
    assert found["nowhere.jpg"] == "No such file or directory"
    assert found["empty.jpg"] == "the file is empty"
    assert [step for step, loss in losses(run).items() if np.isfinite(loss)] == list(range(1, state(run)["step"] + 1))


def test_files_that_vanish_during_training_are_replaced_and_named_once(images, tmp_path, monkeypatch, whole_batches):
    data = Path(shutil.copytree(images, tmp_path / "data"))
    gone = ["005.jpg", "006.jpg"]

    def vanish(self: Toy, step: int, steps: int) -> None:
        if step == 2:
            for name in gone:
                (data / name).unlink()

    monkeypatch.setattr(Toy, "after_step", vanish)
    run = train(toy_config(data, tmp_path / "run", max_bad=0.1, steps=18))
    assert named(run) == dict.fromkeys(gone, "No such file or directory")
    assert state(run)["data"]["count"] >= 2 * len(gone)  # in the second and in the third epoch


def shard(path: Path, images: list[Path]) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path, "w") as tar:
        for image in images:
            tar.add(image, image.name)
    with tarfile.open(path) as tar:
        return {member.name: member for member in tar}


def test_damage_inside_a_shard_costs_its_samples_and_no_others(images, tmp_path, monkeypatch, whole_batches):
    """A member whose bytes are overwritten, and a shard that loses its last three members during the run."""
    files = sorted(images.iterdir())
    members = [shard(tmp_path / f"{i}.tar", files[i * 24 : i * 24 + 24]) for i in range(2)]
    with open(tmp_path / "0.tar", "r+b") as file:
        file.seek(members[0]["007.jpg"].offset_data)
        file.write(bytes(400))

    def shorten(self: Toy, step: int, steps: int) -> None:
        if step == 1:
            os.truncate(tmp_path / "1.tar", members[1]["045.jpg"].offset_data + 5)

    monkeypatch.setattr(Toy, "after_step", shorten)
    run = train(toy_config(tmp_path / "{0..1}.tar", tmp_path / "run", max_bad=0.1, steps=18))
    found = named(run)
    assert set(found) == {"007", "045", "046", "047"}
    assert found["007"] == "not an image of a known format"
    assert all("the shard ends" in found[name] for name in ("045", "046", "047"))
