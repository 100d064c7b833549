"""`--overwrite`: no label of before is left under new settings, whoever is killed and whoever comes next."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.vesl.vesl_processes import contents, start

pytestmark = pytest.mark.usefixtures("nltk_data")
ANEW = ("--max-regions", 1, "--max-phrases", 3)


@pytest.fixture
def rank(monkeypatch, vesl):
    """A command as one rank of some."""

    def run(number: int, ranks: int, *arguments: object) -> tuple[int, str]:
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        return vesl(*arguments)

    return run


@pytest.fixture
def old_and_new(tmp_path, pairs, vesl, flags):
    """A command, its finished folder of other settings, and what a fresh folder of its own settings holds."""
    command = ["run", "--data", pairs(22), *flags]
    assert vesl(*command, "--out", tmp_path / "out")[0] == 0
    assert vesl(*command, *ANEW, "--out", tmp_path / "fresh")[0] == 0
    return [*command, *ANEW, "--out", tmp_path / "out"], tmp_path / "out", contents(tmp_path / "fresh")


def pending(out: Path) -> list[dict]:
    return json.loads((out / "vesl.json").read_text()).get("forgetting", [])


@pytest.mark.parametrize("unlinks", [0, 1, 12])
def test_killed_while_it_removes_the_same_command_without_overwrite_goes_on(
    tmp_path, old_and_new, vesl, models, unlinks
) -> None:
    command, out, fresh = old_and_new
    environment = {"NLTK_DATA": str(models / "nltk"), "OMP_NUM_THREADS": "1"}
    process = start([*command, "--overwrite"], tmp_path / "told", environment, unlinks)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "told").read_text()
    assert pending(out) == [{"stage": "caption", "ranks": 1, "left": [0]}]
    assert vesl(*command)[0] == 0
    assert contents(out) == fresh


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_rank_that_never_came_to_overwrite_forgets_when_it_comes(old_and_new, rank, ranks) -> None:
    """And where other ranks come instead, the first of them forgets for it."""
    command, out, fresh = old_and_new
    assert rank(0, 2, *command, "--overwrite")[0] == 0
    assert pending(out) == [{"stage": "caption", "ranks": 2, "left": [1]}]
    for number in range(ranks):
        assert rank(number, ranks, *command)[0] == 0
    assert contents(out) == fresh


def test_what_a_rank_has_made_anew_is_left_alone_by_the_others(old_and_new, rank) -> None:
    command, out, fresh = old_and_new
    assert rank(0, 2, *command, "--overwrite")[0] == 0
    made = (out / "shards/000000.tar").stat().st_mtime_ns
    assert rank(1, 2, *command, "--overwrite")[0] == 0
    assert (out / "shards/000000.tar").stat().st_mtime_ns == made
    assert contents(out) == fresh


def test_settings_that_change_once_more_make_every_rank_forget_again(old_and_new, rank) -> None:
    command, out, fresh = old_and_new
    assert rank(0, 2, *command, "--max-regions", 2, "--prompt", "", "--max-phrases", 1, "--overwrite")[0] == 0
    assert rank(1, 2, *command, "--overwrite", "--shard-size", 4)[0] == 0
    assert pending(out) == [{"stage": "caption", "ranks": 2, "left": [0]}]
    code, told = rank(0, 2, *command)
    assert code == 2 and "--shard-size was 4" in told
    for number in range(2):
        assert rank(number, 2, *command, "--overwrite")[0] == 0
    assert contents(out) == fresh


def test_a_later_step_made_anew_does_not_make_an_earlier_one_forgotten(old_and_new, rank, flags) -> None:
    """Rank 1 still has captions of before when the detector is begun anew."""
    command, out, fresh = old_and_new
    assert rank(0, 2, *command, "--overwrite")[0] == 0
    detect = ["detect", "--out", out, *flags[2:6], "--workers", 0, "--device", "cpu", "--max-regions", 1]
    assert rank(0, 2, *detect, "--overwrite")[0] == 0
    assert [one["stage"] for one in pending(out)] == ["caption", "detect"]
    assert rank(1, 2, *command)[0] == 0
    assert contents(out) == fresh


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[]",
            "3",
            '{"data": 3}',
            '{"data": {"data": 3, "shard_size": 5}}',
            '{"data": {"data": "x"}}',
            '{"caption": []}',
        ),
        *('{"forgetting": 1}', '{"forgetting": [{"stage": "nap", "ranks": 1, "left": []}]}', "{", ""),
        '{"forgetting": [{"stage": "detect", "ranks": 0, "left": [0]}]}',
    ],
)
def test_a_damaged_vesl_json_is_told_and_what_is_told_helps(tmp_path, pairs, vesl, flags, text) -> None:
    command = ["run", "--data", pairs(6), "--out", tmp_path / "out", *flags]
    assert vesl(*command)[0] == 0
    made = contents(tmp_path / "out")
    (tmp_path / "out/vesl.json").write_text(text)
    common = ["--out", tmp_path / "out", "--workers", 0, "--device", "cpu"]
    for again in (command, ["phrases", *common], ["detect", *common, *flags[2:6], "--overwrite"]):
        code, told = vesl(*again)
        assert code == 2 and "Traceback" not in told
        assert "cannot be read" in told and "`python -m locfast.vesl run` with --data and --overwrite" in told
    assert vesl(*command, "--overwrite")[0] == 0
    assert contents(tmp_path / "out") == made
