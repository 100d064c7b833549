"""One rank's share of a batch, measured without the others, computes what that rank computes."""

import json
import sys
from unittest import mock

import _region_share
import pytest
import region_loss
import torch
from _region_share import Case, Share


@pytest.fixture
def case() -> Case:
    return Case(4, 64, 32, torch.device("cpu"))


def test_sums_and_gradients_are_those_of_the_whole_batch(case):
    case.check()


def test_a_block_left_out_or_counted_twice_is_refused(case, monkeypatch):
    whole = Share.blocks
    for blocks in (lambda *given: list(whole(*given))[:-1], lambda *given: [*whole(*given), (3, case.share._texts[3])]):
        monkeypatch.setattr(Share, "blocks", blocks)
        with pytest.raises(AssertionError, match="whole batch"):
            case.check()


def test_gradients_of_too_few_blocks_are_refused(case, monkeypatch):
    forward = case.forward
    whole = Share.blocks

    def both():
        loss, *facts = forward()
        monkeypatch.setattr(Share, "blocks", lambda *given: list(whole(*given))[:-1])
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(loss, case.leaves[0])
        return facts[3][0], grad, None

    with mock.patch.object(_region_share.ops, "_ranks", lambda *asked: case.share):
        monkeypatch.setattr(case, "both", both)
        with pytest.raises(AssertionError, match="gradients of regions"):
            case.check()


def test_the_script_writes_a_row_for_either_direction(tmp_path, monkeypatch):
    asked = ["region_loss.py", "--share", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", asked)
    region_loss.main()
    found = json.loads((tmp_path / "cpu" / "region_share.json").read_text())
    assert found["smoke"] and [row["direction"] for row in found["rows"]] == ["forward", "both"]
    assert all(row["ms"] is not None and "worked out" in row["note"] for row in found["rows"])
    assert found["rows"][0]["shape"] == {"ranks": 4, "R": 256, "E": 64}
