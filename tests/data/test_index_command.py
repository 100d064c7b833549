"""The `index` subcommand: every index made ahead, broken shards named, the others indexed."""

import argparse
import os
import subprocess
import sys

import pytest

from locfast.data.commands import index
from locfast.errors import UserError


@pytest.fixture
def shards(tmp_path, jpeg, write_tar):
    for shard in range(3):
        write_tar(tmp_path / f"s-{shard}.tar", {f"{i}.jpg": jpeg(seed=i) for i in range(4)})
    return tmp_path


def told(capsys, *arguments: str) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    index.add_arguments(parser)
    code = index.run(parser.parse_args(list(arguments)))
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("spec", "workers"), [("", "0"), ("/s-{0..2}.tar", "2"), ("/*.tar", "1")])
def test_every_shard_is_indexed_and_counted(shards, capsys, spec, workers):
    code, out, err = told(capsys, f"{shards}{spec}", "--workers", workers)
    assert code == 0
    assert out.startswith("3 shards, 12 samples, ")
    assert len(list(shards.glob("*.tar.index.npz"))) == 3
    assert err.splitlines()[-1] == "3 of 3 shards"


def test_shards_by_url_are_indexed_too(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCFAST_CACHE", str(tmp_path / "cache"))
    code, out, _ = told(capsys, f"file://{shards}", "--workers", "2")
    assert code == 0
    assert out.startswith("3 shards, 12 samples, ")
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 3


def test_broken_shards_are_named_and_the_others_indexed(shards, capsys):
    (shards / "s-1.tar").write_bytes(b"no archive" * 100)
    os.truncate(shards / "s-2.tar", 1500)
    code, out, _ = told(capsys, str(shards), "--workers", "2")
    assert code == 2
    assert out.startswith("3 shards, 4 samples, ")
    assert [line for line in out.splitlines() if line.startswith("broken: ")] == [
        line for line in out.splitlines() if "s-1.tar" in line or "s-2.tar" in line
    ]
    assert "2 of 3 shards cannot be used" in out
    assert (shards / "s-0.tar.index.npz").is_file()


def test_a_missing_shard_of_a_pattern_is_named(shards, capsys):
    code, out, _ = told(capsys, f"{shards}/s-{{0..3}}.tar")
    assert code == 2
    assert "s-3.tar, which cannot be opened" in out


@pytest.mark.parametrize("spec", ["/nothing", "/empty", "/s-0.txt"])
def test_what_names_no_shard_is_a_mistake(shards, spec):
    (shards / "empty").mkdir()
    (shards / "s-0.txt").write_text("")
    parser = argparse.ArgumentParser()
    index.add_arguments(parser)
    with pytest.raises(UserError, match="a shard, a folder of shards, or a pattern"):
        index.run(parser.parse_args([f"{shards}{spec}"]))


def test_the_command_imports_no_torch_before_it_runs():
    code = "import sys, locfast.data.commands.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
