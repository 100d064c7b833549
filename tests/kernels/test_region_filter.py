"""Which captions are nearly the same: one answer for a pair wherever it is asked, and what keeps it."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from locfast.kernels.region_contrastive_loss import tiled
from locfast.kernels.region_contrastive_loss.block import Block
from locfast.kernels.region_contrastive_loss.filter import exceeds, in_fixed_order, pack, unpack

from .region_loss_checks import FORMS, FUSED, NAMES, on_the_threshold, run, usable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
def test_packed_flags_come_back(columns, device):
    flags = torch.rand(5, columns, generator=torch.Generator().manual_seed(columns)).to(device) < 0.5
    flags[0], flags[1] = True, False
    words = pack(flags)
    assert words.shape == (5, -(-columns // 32)) and words.dtype == torch.int32
    assert torch.equal(unpack(words, columns), flags)


def test_the_pair_of_a_column_is_a_bit_of_its_word(device):
    for column in (0, 30, 31, 32, 63):
        words = pack(torch.arange(64, device=device)[None] == column)
        value = 1 << column % 32
        wanted = [0, 0]
        wanted[column // 32] = value - 2**32 if value == 2**31 else value  # the sign is a bit too
        assert words.tolist() == [wanted]


def test_a_cosine_on_the_threshold_is_not_above_it(device):
    units = torch.tensor([[1.0, 0.0], [0.6, 0.8]], device=device)
    cosine = units[1, 0].item()
    below = torch.nextafter(units[1, 0], units.new_zeros(())).item()
    off_diagonal = torch.tensor([[False, True], [True, False]], device=device)
    assert not exceeds(units, units, cosine)[off_diagonal].any()
    assert exceeds(units, units, below)[off_diagonal].all()
    assert not exceeds(units[:1], units[:1], 1.0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fixed_order_is_a_sum_of_halves(dtype, device):
    a, b = (x.to(dtype) for x in torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(device))
    terms = a.float() * b.float()
    x = [terms[:, k] for k in range(5)]
    wanted = ((x[0] + x[4]) + x[2]) + (x[1] + x[3])
    assert torch.equal(in_fixed_order(a, b, torch.float32), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_on_the_threshold_are_told_alike_in_every_shape(dtype, device):
    texts, threshold = on_the_threshold(90, 48, dtype, device)
    units = F.normalize(texts.float(), dim=-1).to(dtype)
    whole = exceeds(units, units, threshold)
    assert_undecided(units, threshold, whole)
    assert torch.equal(whole, whole.T)
    for rows in (1, 7, 64):
        for part, wanted in zip(units.split(rows), whole.split(rows), strict=True):
            assert torch.equal(exceeds(part, units, threshold), wanted)
            assert torch.equal(exceeds(units, part, threshold), wanted.T)
            assert torch.equal(exceeds(part, units[5:38], threshold), wanted[:, 5:38])
    padded = F.pad(units, (0, 16, 0, 38))  # as tiles are filled up
    assert torch.equal(exceeds(padded, padded, threshold)[:90, :90], whole)


def assert_undecided(units: Tensor, threshold: float, above: Tensor) -> None:
    """The inputs test something: many pairs are within rounding of the threshold, on either side of it."""
    error = (units.double() @ units.double().T - threshold).abs()
    near = (error < 48 * 2**-24).fill_diagonal_(False)
    assert near.sum() > 200
    assert above[near].any() and not above[near].all()  # of two orders of sums one may be above, one not


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_forward_and_backward_decide_alike_on_the_threshold(backend, dtype, form, device, monkeypatch):
    usable(backend, device)
    texts, threshold = on_the_threshold(90, 48, dtype, device)
    regions = torch.randn(90, 48, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    inputs = (regions, texts, torch.tensor(10.0, device=device))
    monkeypatch.setitem(tiled.MAX_PANEL, device.type, 7 * 90)
    kept, fresh = (run(inputs, form, backend, None, threshold, keep_filter=keep) for keep in (True, False))
    for name, a, b in zip(NAMES, kept, fresh, strict=False):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_decides_alike_in_every_tile_and_its_mirror_image(dtype, device):
    """By half of the tiles and their mirror images, by all of them, and as blocks of other ranks' texts."""
    usable("triton", device)
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("an interpreter's 16-bit products have an order of their own for every shape")
    triton = importlib.import_module("locfast.kernels.region_contrastive_loss.triton")
    rows = 600 if device.type == "cuda" else 200  # of which whole tiles make two halves
    texts, threshold = on_the_threshold(rows, 48, dtype, device)
    valid = torch.ones(rows, dtype=torch.bool, device=device)
    _, units, _, _, valid = triton.prepare(texts, texts, valid, dtype)
    one = torch.tensor(1.0, dtype=torch.float64, device=device)
    block = Block(units, units, units, valid, valid, True, one, None, threshold)
    whole, half = triton.dropped_pairs(block), len(units) // 2
    assert torch.equal(triton._dropped(block, slice(0, len(units))), whole)
    other = Block(units[half:], units[:half], units[half:], valid[half:], valid[:half], False, one, None, threshold)
    assert torch.equal(triton.dropped_pairs(other), whole[half:, : half // 32])
    flags = unpack(whole, len(units))
    assert torch.equal(flags, flags.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_backends_keep_the_bits_that_are_the_definition(backend, dtype, device, monkeypatch):
    """A bit for every pair that counts nowhere: above the threshold by a fixed order, a positive, or not valid."""
    usable(backend, device)
    texts, threshold = on_the_threshold(140, 48, dtype, device)
    valid = torch.arange(140, device=device) % 3 != 1
    monkeypatch.setitem(tiled.MAX_PANEL, device.type, 9 * 140)
    arguments = (valid, threshold, dtype, "", "auto", True, backend)
    scale = torch.tensor(10.0, device=device)
    saved = torch.ops.locfast.region_contrastive_loss(texts, texts, scale, None, *arguments)
    units, bits = saved[2], saved[7]
    units = units[:140, :48]
    wanted = F.normalize(texts.float(), dim=-1).masked_fill(~valid[:, None], 0).to(dtype)
    torch.testing.assert_close(units, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
    every = in_fixed_order(units.repeat_interleave(140, 0), units.repeat(140, 1), torch.float32).view(140, 140)
    counted = valid[:, None] & valid & ~torch.eye(140, dtype=torch.bool, device=device) & (every <= threshold)
    found = ~unpack(bits[0], 140)[:140]
    if backend == "triton":  # has an order of its own, by which a pair and its mirror image are alike
        assert torch.equal(found, found.T)
        found, counted = (flags & ((every - threshold).abs() > 48 * 2**-23) for flags in (found, counted))
        assert counted.any()
    assert torch.equal(found, counted)
