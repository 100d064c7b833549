"""`python -m locfast.probe`: a user's mistakes end with one message, and nothing is lost by them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locfast import probe
from locfast.cli import parse_train
from locfast.engine.run import train
from tests.eval.labelled_folder import write_data

QUICK = [
    "--heads",
    "linear",
    "--tasks",
    "local",
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--workers",
    "0",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("labelled"))


def run(*arguments, capsys, monkeypatch) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["probe", *map(str, arguments)])
    try:
        probe.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.fixture
def call(capsys, monkeypatch):
    return lambda *arguments: run(*arguments, capsys=capsys, monkeypatch=monkeypatch)


def test_a_probe_and_a_comparison_from_the_command_line(call, data, tmp_path):
    code, told, error = call("--data", data, "--out", tmp_path / "a", "--seeds", "0", "1", *QUICK)
    assert code == 0, error
    assert "local, linear" in told and "training images held out" in told
    assert {"probe.json", "report.html", "counts", "heads", "pictures", "shares.npz"} == {
        file.name for file in (tmp_path / "a").iterdir()
    }
    code, told, error = call("--data", data, "--out", tmp_path / "b", "--no-pretrained", "--name", "blank", *QUICK)
    assert code == 0, error
    code, told, error = call("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert code == 0, error
    assert "blank" in told and (tmp_path / "c" / "report.html").is_file()
    assert json.loads((tmp_path / "c" / "compare.json").read_text())["baseline"] == "demo"


def test_the_papers_protocol_is_told_with_its_figures(call, data, tmp_path):
    code, told, _ = call("--data", data, "--out", tmp_path / "a", "--protocol", "paper", *QUICK)
    assert code == 0 and "The paper's protocol" in told


def test_nothing_is_overwritten_unasked_and_a_probe_that_fails_leaves_the_old_one(call, data, tmp_path):
    assert call("--data", data, "--out", tmp_path / "a", *QUICK)[0] == 0
    before = (tmp_path / "a" / "probe.json").read_bytes()
    code, _, error = call("--data", data, "--out", tmp_path / "a", *QUICK)
    assert code == 2 and "Add --overwrite" in error
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    code, _, error = call("--data", data, "--out", tmp_path / "thesis", "--overwrite", *QUICK)
    assert code == 2 and "thesis.tex" in error and (tmp_path / "thesis" / "thesis.tex").is_file()
    (tmp_path / "run").mkdir()
    for file in ("probe.json", "config.yaml"):  # as the embedded demo leaves them
        (tmp_path / "run" / file).write_text("{}")
    code, _, error = call("--data", data, "--out", tmp_path / "run", "--overwrite", *QUICK)
    assert code == 2 and "a run is there" in error and (tmp_path / "run" / "config.yaml").is_file()
    bad = write_data(tmp_path / "bad")
    (bad / "images/train/train3.jpg").write_bytes(b"")
    code, _, error = call("--data", bad, "--out", tmp_path / "a", "--overwrite", *QUICK)
    assert code == 2 and "train3.jpg" in error
    assert (tmp_path / "a" / "probe.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".partial")] == []


def test_overwriting_a_probe_touches_nothing_but_its_files(call, data, tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    before = out.stat().st_ino
    assert call("--data", data, "--out", out, *QUICK)[0] == 0
    for name in ("notes.txt", "b/probe.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (out / "pictures" / "99.png").write_text("of an older probe")
    assert call("--data", data, "--out", out, "--overwrite", "--limit", "12", *QUICK)[0] == 0
    assert (out / "notes.txt").read_text() == (out / "b" / "probe.json").read_text() == "mine"
    assert json.loads((out / "probe.json").read_text())["images"]["validation"] == 10
    assert json.loads((out / "probe.json").read_text())["images"]["train"] == 11
    assert not (out / "pictures" / "99.png").exists()
    assert out.stat().st_ino == before  # the folder itself stays: it may be mounted, or a shell may be in it


def harmed(root: Path, harm: str) -> Path:
    write_data(root)
    map_file = root / "annotations/train/train5.png"
    if harm == "other size":
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(map_file)
    elif harm == "id out of range":
        Image.fromarray(np.full((48, 64), 7, np.uint8)).save(map_file)
    elif harm == "no pair":
        map_file.unlink()
    elif harm == "no classes":
        (root / "classes.txt").unlink()
    elif harm == "in both":
        for kind, end in (("images", "jpg"), ("annotations", "png")):
            (root / kind / "val" / f"train5.{end}").write_bytes((root / kind / "train" / f"train5.{end}").read_bytes())
    elif harm in ("no label anywhere", "no label in training", "no label held out"):
        left = "train7.png" if harm == "no label held out" else ""
        for file in (root / "annotations" / ("val" if harm == "no label anywhere" else "train")).iterdir():
            if file.name == left:
                continue
            Image.fromarray(np.full((48, 64), 255, np.uint8)).save(file)
    return root


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("other size", ("train5.jpg", "train5.png", "20 x 20")),
        ("id out of range", ("train5.png", "7")),
        ("no pair", ("train5.jpg",)),
        ("no classes", ("classes.txt",)),
        ("in both", ("train5.jpg", "training")),
        ("no label anywhere", ("no validation image has any class",)),
        ("no label in training", ("no training image has any class",)),
        ("no label held out", ("no held-out training image has any class", "--held-out")),
    ],
)
def test_bad_data_is_named(call, tmp_path, harm, told):
    code, _, error = call("--data", harmed(tmp_path / "data", harm), "--out", tmp_path / "out", *QUICK)
    assert code == 2 and error.count("locfast:") == 1
    assert all(word in error for word in told), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "demo"], "--out DIR"),
        (["--data", "nowhere", "--out", "o"], "nowhere"),
        (["--heads", "resnet", "--out", "o"], "--heads resnet"),
        (["--model", "vit_no_such", "--out", "o"], "vit_no_such"),
        (["--features", "cache", "--out", "o"], "--cache DIR"),
        (["--cache", "/dev/null/c", "--out", "o"], "--cache /dev/null/c"),
        (["--out", "/dev/null/o"], "--out /dev/null/o"),
        (["--lr", "1e30", "--epochs", "3", "--out", "o"], "smaller --lr"),
        (["--weight-decay", "nan", "--out", "o"], "--weight-decay nan"),
        (["--seeds", str(2**64), "--out", "o"], "--seeds"),
        (["--unlabeled", "99", "--out", "o"], "99"),
        (["--cache", "/proc/nothere", "--out", "o"], "--cache /proc/nothere"),
        (["--out", "/proc/nothere/o"], "--out /proc/nothere/o"),
        (["--compare", "a", "--out", "o"], "two folders or more"),
    ],
)
def test_mistakes_of_the_user_have_one_message_each(call, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    code, _, error = call("--limit", "8", "--epochs", "1", "--workers", "0", *arguments)
    assert code == 2 and told in error, error
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_is_probed_with_its_cap_and_its_weights(call, data, tmp_path):
    words = f"--model demo --data {data / 'images'} --out {tmp_path / 'run'} --steps 2 --batch-size 4 --workers 0"
    train(parse_train([*words.split(), "--val", "none", "--device", "cpu"]))
    wanted = ["--model", tmp_path / "run", "--data", data, *QUICK]
    code, _, error = call(*wanted, "--out", tmp_path / "p")
    assert code == 0, error
    result = json.loads((tmp_path / "p" / "probe.json").read_text())
    assert (result["model"], result["softcap"], result["settings"]["model"]) == ("run", 30.0, str(tmp_path / "run"))
    code, _, error = call(*wanted, "--softcap", "5", "--out", tmp_path / "q")
    assert code == 2 and "is a run" in error


def test_a_probe_that_is_killed_while_it_fills_its_cache_leaves_nothing_that_the_next_one_takes(call, tmp_path):
    """A real process, killed at once when its cache begins; the next probe makes both splits anew and agrees."""
    cache, data = tmp_path / "cache", ["--data", "demo", "--limit", "300", "--features", "cache", "--cache"]
    words = [sys.executable, "-m", "locfast.probe", *data, str(cache), *QUICK, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(cache.glob(".partial-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    left = list(cache.glob(".partial-*"))
    assert left and not list(cache.glob("[!.]*")) and not (tmp_path / "killed").exists()
    code, told, error = call(*data, cache, *QUICK, "--out", tmp_path / "a")
    assert code == 0 and told.count("features written") == 2, error
    assert not [folder for folder in left if folder.exists()]  # and what was left is gone
    code, told, error = call(*data, cache, *QUICK, "--out", tmp_path / "b")
    assert code == 0 and told.count("features read") == 2, error
    first, second = (json.loads((tmp_path / name / "probe.json").read_text())["heads"] for name in "ab")
    assert first == second
