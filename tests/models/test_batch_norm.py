"""Batch norm over ranks is batch norm over the whole batch; so is a contrast with what other ranks hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from locfast.methods.context_loss import distance
from locfast.models.batch_norm import GlobalBatchNorm1d
from tests.models.two_ranks import RANKS, WIDTH, Network, keys_and_queries, rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What every rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.models.two_ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def joined(ranks: list[dict], name: str) -> torch.Tensor:
    return torch.cat([found[name] for found in ranks])


def test_two_ranks_normalise_by_the_statistics_of_the_whole_batch(ranks: list[dict]) -> None:
    norm, x = nn.BatchNorm1d(WIDTH).double(), rows().double().requires_grad_()
    out = norm(x)
    (out**3).sum().backward()
    # fp32 at 1000: 2^-14 a number, of a deviation of one; squares would leave nothing of the variance
    torch.testing.assert_close(joined(ranks, "out").double(), out, rtol=0, atol=3 * 2**-14)
    torch.testing.assert_close(joined(ranks, "grad").double(), x.grad, rtol=0, atol=30 * 2**-14)
    for found in ranks:
        for name, value in found["state"].items():
            wanted = norm.state_dict()[name]
            torch.testing.assert_close(value.to(wanted.dtype), wanted, rtol=2**-14, atol=0, msg=name)
        assert found["state"].keys() == norm.state_dict().keys()
        assert all(torch.equal(value, ranks[0]["state"][name]) for name, value in found["state"].items())


def test_gradients_under_ddp_are_those_of_the_whole_batch(ranks: list[dict]) -> None:
    network = Network(nn.BatchNorm1d)
    for number in (1, 2):
        network(rows(number).double() - 1000).backward()
    for found in ranks:
        for name, parameter in network.named_parameters():
            # batch norm takes the bias away: its gradient is zero, up to rounding
            torch.testing.assert_close(found["network"][name], parameter.grad, rtol=1e-9, atol=1e-10, msg=name)
        state = network.norm.state_dict()
        torch.testing.assert_close(found["network state"], state, rtol=1e-12, atol=1e-12)


def test_in_eval_mode_a_rank_asks_no_other(ranks: list[dict]) -> None:
    norm = nn.BatchNorm1d(WIDTH)
    norm.load_state_dict(ranks[0]["state"])
    torch.testing.assert_close(joined(ranks, "eval"), norm.eval()(rows()), rtol=0, atol=0)


def test_alone_it_is_torchs_batch_norm_in_fp32_at_least() -> None:
    ours, theirs = GlobalBatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
    x = torch.randn(5, WIDTH)
    assert torch.equal(ours(x), theirs(x)) and ours(x.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="more than 1 value"):
        ours(x[:1])


def test_info_nce_finds_its_negatives_on_every_rank(ranks: list[dict]) -> None:
    p, t = keys_and_queries()
    p.requires_grad_()
    loss = distance(p, t, "info_nce", 0.2, everywhere=True)
    loss.backward()
    torch.testing.assert_close(torch.stack([found["nce"] for found in ranks]).mean(), loss.detach())
    torch.testing.assert_close(joined(ranks, "nce grad") / RANKS, p.grad)  # DDP takes the mean over ranks
    assert all(found["alone"] < found["nce"] for found in ranks)
