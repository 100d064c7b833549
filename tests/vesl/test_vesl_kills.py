"""A run that is killed, again and again, ends with the bytes of an unbroken one."""

from __future__ import annotations

import random
import time

import pytest

from tests.vesl.vesl_processes import contents, start

KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_twenty_random_points_ends_with_the_same_bytes(tmp_path, pairs, models, flags, ranks) -> None:
    """SIGKILL to all ranks; their decoding processes go with them. What lies there after each kill is whole."""
    command = ["run", "--data", pairs(40, bad=(3, 17)), *flags, "--workers", 1, "--shard-size", 2]
    environment = {"NLTK_DATA": str(models / "nltk"), "OMP_NUM_THREADS": "1"}

    def files(out) -> int:
        return len([*out.glob("[a-z]*/*")])

    def begin(out, world: int):
        told = tmp_path / f"{out.name}.told"
        each = [{**environment, "WORLD_SIZE": str(world), "RANK": str(rank)} for rank in range(world)]
        return [start([*command, "--out", out], told, one) for one in each]

    (whole,) = begin(tmp_path / "whole", 1)
    whole.join(120)
    assert whole.exitcode == 0, (tmp_path / "whole.told").read_text()
    expected = contents(tmp_path / "whole")
    assert len(expected) == 1 + 4 * 20

    chance, kills, folder, finished, seen = random.Random(ranks), 0, 0, 0, set()
    while kills < KILLS or not finished:
        assert folder < 3 * KILLS, "runs end before they are killed"
        out = tmp_path / f"out-{folder}"
        processes = begin(out, ranks)
        if kills < KILLS:
            until = files(out) + chance.randint(0, 9)
            while files(out) < until and any(process.is_alive() for process in processes):
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.02))  # a chunk of a step takes some 5 ms
            alive = [process.is_alive() for process in processes]
            for process in processes:
                process.kill()
        for process in processes:
            process.join(120)
        there = contents(out) if out.exists() else {}
        if any(process.exitcode for process in processes):
            assert kills < KILLS and any(alive), (tmp_path / f"{out.name}.told").read_text()
            kills += 1
            seen.add(len(there))
            # what is there is whole, in the middle of a run as at its end
            assert all(expected[name] == data for name, data in there.items() if name != "vesl.json")
        else:
            assert there == expected and not (out / ".aside").exists()
            finished += 1
            folder += 1
    assert len(seen) >= 10  # it was killed at many different places
