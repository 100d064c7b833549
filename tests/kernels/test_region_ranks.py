"""The region losses on several ranks are those of one rank that has the whole batch."""

import re
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

from locfast.kernels.region_contrastive_loss import region_contrastive_loss
from locfast.kernels.region_contrastive_loss.filter import unpack

from .region_loss_checks import FUSED, NAMES, run
from .region_ranks import CASES, NEEDED, RANKS, ROWS, Case, layer_and_images, runs_here, whole_batch

BACKENDS = ("reference", *FUSED)
MANY = [case for case in CASES if case.backend != "reference"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What every rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.kernels.region_ranks", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def of_group(ranks: list[dict], case: Case) -> list[dict]:
    """The results of the ranks of one group, the second pair where there are two."""
    if not runs_here(case.backend):
        pytest.skip(f"no {case.backend} here")
    return [results[str(case)] for results in ranks[-case.ranks :]]


def assert_rounded_otherwise(found: Tensor, wanted: Tensor, name: str, error: float = 2**-20) -> None:
    """In fp32 a logit of 15 powers of two errs by 2^-21 if summed in another order, and two weights with it."""
    assert found.dtype == wanted.dtype
    found, wanted = found.double(), wanted.double()
    torch.testing.assert_close(found, wanted, rtol=error, atol=error * wanted.abs().max().item(), msg=name)


def error_of(case: Case) -> float:
    """In bf16 a weight or a gradient may round to its neighbour, which is 2^-7 away at most."""
    return 2**-7 if case.batch == "bf16" else 2**-20


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_one_rank_with_the_whole_batch(case, ranks):
    found = [result["found"] for result in of_group(ranks, case)]
    inputs, valid, threshold = whole_batch(case.batch)
    wanted = run(inputs, case.form, case.backend, valid, threshold)
    assert all(torch.equal(of_rank[0], found[0][0]) for of_rank in found)
    assert_rounded_otherwise(found[0][0], wanted[0], "loss")
    for i, name in enumerate(NAMES[1 : len(wanted)], 1):
        parts = [of_rank[i] for of_rank in found]
        # Every rank has its rows' gradient, and its rows' share of that of what all ranks share.
        whole = torch.cat(parts) if wanted[i].ndim else torch.stack(parts).sum(0)
        assert_rounded_otherwise(whole, wanted[i], name, error_of(case))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_ranks_give_the_same_bits_and_a_kept_filter_those_of_a_fresh_one(backend, ranks):
    for case in (case for case in CASES if case.backend == backend):
        for result in of_group(ranks, case):
            assert result["again"] and result["fresh"], case


@pytest.mark.parametrize("case", MANY, ids=str)
def test_ranks_decide_about_a_pair_as_one_rank_does(case, ranks):
    rows = ROWS // case.ranks
    found = [torch.cat([unpack(words, rows)[:rows] for words in result["bits"]], 1) for result in of_group(ranks, case)]
    (regions, texts, scale), valid, threshold = whole_batch(case.batch)
    arguments = (None, valid, threshold, texts.dtype, "", "auto", True, case.backend)
    bits = torch.ops.locfast.region_contrastive_loss(regions, texts, scale, *arguments)[7]
    wanted = unpack(bits[0], ROWS)[:ROWS]
    counted = wanted[valid][:, valid]
    assert counted.any() and not counted.all()
    assert torch.equal(torch.cat(found), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_s_number_in_its_group_is_what_counts(backend, ranks):
    """Both pairs have one batch: ranks 2 and 3 are the first and the second of theirs."""
    for case in (case for case in CASES if case.backend == backend and case.ranks == 2):
        for a, b in zip(ranks, of_group(ranks, case), strict=False):
            assert all(torch.equal(x, y) for x, y in zip(a[str(case)]["found"], b["found"], strict=True)), case


@pytest.mark.parametrize("case", [case for case in MANY if case.exchange == "ring"], ids=str)
def test_ring_and_gather_agree(case, ranks):
    other = Case(case.ranks, case.form, case.backend, "gather", case.batch)
    for a, b in zip(of_group(ranks, case), of_group(ranks, other), strict=True):
        assert torch.equal(a["bits"], b["bits"])
        for name, x, y in zip(NAMES, a["found"], b["found"], strict=False):
            assert_rounded_otherwise(x, y, name, error_of(case))


def test_ranks_that_call_otherwise_than_the_others_are_told_so_on_every_rank(ranks):
    wanted = {
        "rows": r"same regions and texts.*rank 0: \[4, 8\]; rank 1: \[6, 8\]",
        "threshold": r"same filter_threshold.*rank 0: None; rank 1: 0\.9",
        "exchange": "same exchange.*rank 0: ring; rank 1: gather",
        "gradients": r"same requires_grad.*rank 0: \(False, False\); rank 1: \(False, True\)",
    }
    for results in ranks:
        assert results["refused"].keys() == wanted.keys()
        for name, text in wanted.items():
            assert re.search(text, results["refused"][name]), name


@pytest.mark.parametrize("size", [2, 4])
def test_under_data_parallel_the_loss_times_the_ranks_gives_the_whole_gradient(size, ranks):
    layer, images = layer_and_images()
    (_, texts, scale), valid, _ = whole_batch("uneven")
    region_contrastive_loss(layer(images), texts, logit_scale=scale, valid=valid).backward()
    for grads in (results[size, "ddp"] for results in ranks):
        for (name, parameter), grad in zip(layer.named_parameters(), grads, strict=True):
            assert_rounded_otherwise(grad, parameter.grad, name)


@pytest.mark.parametrize(("size", "exchange", "needed"), list(product((2, 4), ("ring", "gather"), NEEDED)))
def test_one_side_alone_may_need_a_gradient(size, exchange, needed, ranks):
    """Ranks then send no gradients of texts, or have none of regions, and none waits for what does not come."""
    (regions, texts, scale), valid, _ = whole_batch("uneven")
    leaf = (regions if needed == "regions" else texts).requires_grad_()
    region_contrastive_loss(regions, texts, logit_scale=scale, valid=valid, backend="tiled").backward()
    found = [results[size, exchange, needed] for results in ranks[-size:]]
    this, other = (0, 1) if needed == "regions" else (1, 0)
    assert all(grads[other] is None for grads in found)
    assert_rounded_otherwise(torch.cat([grads[this] for grads in found]), leaf.grad, needed)
