"""The region losses are right: their formulas, their derivatives, and every backend beside the reference."""

import importlib
import math

import pytest
import torch
from torch.nn import functional as F

from locfast.kernels.region_contrastive_loss import block, region_contrastive_loss, region_sigmoid_loss, tiled, tiles
from locfast.kernels.region_contrastive_loss.block import Block, weight_unit

from .region_loss_checks import (
    BIAS,
    FORMS,
    FUSED,
    NAMES,
    a_third_invalid,
    check,
    make_inputs,
    run,
    usable,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = ((1, 5), (7, 33), (129, 5), (129, 64))
"""Regions and width: none but the last width fills Triton's tiles."""
LARGE = ((129, 768), (300, 5), (300, 33), (300, 64), (300, 768))
BACKENDS = [
    *((backend, *shape) for shape in SMALL for backend in FUSED),
    *(pytest.param(backend, *shape, marks=pytest.mark.slow) for shape in LARGE for backend in FUSED),
    ("tiled", 130, 768),
]


def double_inputs(rows: int):
    regions, texts, scale = make_inputs(rows, 4, torch.float64)
    return regions.requires_grad_(), texts.requires_grad_(), scale.double().requires_grad_()


def forms_in_fp64(valid, backend):
    """Both losses as functions of regions, texts, scale and bias; the first takes no notice of the bias."""
    options = dict(valid=valid, backend=backend, filter_threshold=0.9)
    return (
        lambda r, t, s, b: region_contrastive_loss(r, t, logit_scale=s, **options),
        lambda r, t, s, b: region_sigmoid_loss(r, t, logit_scale=s, logit_bias=b, **options),
    )


def test_losses_are_their_formulas_written_as_a_loop():
    regions, texts, scale = (x.detach() for x in double_inputs(9))
    valid = torch.arange(9) != 4
    contrastive, sigmoid = (form(regions, texts, scale, -2.0) for form in forms_in_fp64(valid, "reference"))
    r, t = F.normalize(regions, dim=1).tolist(), F.normalize(texts, dim=1).tolist()

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    ways, ones, dropped, rows = 0.0, 0.0, 0, [i for i in range(9) if i != 4]
    for i in rows:
        counted = [j for j in rows if i == j or cosine(t[i], t[j]) <= 0.9]
        dropped += len(rows) - len(counted)
        own = scale.item() * cosine(r[i], t[i])
        ways -= own - math.log(sum(math.exp(scale.item() * cosine(r[i], t[j])) for j in counted))
        ways -= own - math.log(sum(math.exp(scale.item() * cosine(r[j], t[i])) for j in counted))
        for j in counted:
            z = 1 if i == j else -1
            ones += math.log1p(math.exp(-z * (scale.item() * cosine(r[i], t[j]) - 2.0)))
    assert 0 < dropped < 56
    torch.testing.assert_close(contrastive.item(), ways / 16)
    torch.testing.assert_close(sigmoid.item(), ones / 8)


def test_reference_has_right_first_and_second_derivatives():
    regions, texts, scale = double_inputs(5)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True, True, False, True, True])
    for form in forms_in_fp64(valid, "reference"):
        assert torch.autograd.gradcheck(form, (regions, texts, scale, bias))
        assert torch.autograd.gradgradcheck(form, (regions, texts, scale, bias))


def test_tiled_backward_passes_gradcheck(monkeypatch):
    monkeypatch.setitem(tiled.MAX_PANEL, "cpu", 3 * 7)  # panels of three rows, and one of the rest
    regions, texts, scale = double_inputs(7)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    for form in forms_in_fp64(torch.arange(7) != 2, "tiled"):
        assert torch.autograd.gradcheck(form, (regions, texts, scale, bias))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "rows", "width"), BACKENDS)
def test_fused_backends_equal_the_reference(backend, rows, width, dtype, form, device):
    usable(backend, device)
    for scale in (1.0, 100.0):
        check(make_inputs(rows, width, dtype, device, scale), form, backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_rows_that_are_not_valid_count_nowhere_whatever_they_hold(backend, dtype, form, device):
    usable(backend, device)
    regions, texts, scale = make_inputs(150, 33, dtype, device, 20.0)
    regions, texts, valid = a_third_invalid(regions, texts)
    check((regions, texts, scale), form, backend, valid=valid)
    _, regions_grad, texts_grad, *_ = run((regions, texts, scale), form, backend, valid)
    assert not regions_grad[~valid].any() and not texts_grad[~valid].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_without_a_filter_it_is_clip_s_loss(backend, dtype, device):
    usable(backend, device)
    regions, texts, scale = make_inputs(140, 64, dtype, device, 50.0)
    logits = 50 * F.normalize(regions.double(), dim=-1) @ F.normalize(texts.double(), dim=-1).T
    own = torch.arange(140, device=device)
    clip = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    found = run((regions, texts, scale), "contrastive", backend, threshold=None)[0]
    # A cosine of rounded unit rows errs by eps at most, a loss by twice its scale times that.
    torch.testing.assert_close(found.double(), clip, rtol=0, atol=2 * 50 * torch.finfo(dtype).eps)
    check((regions, texts, scale), "contrastive", backend, threshold=None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", [1, -1], ids=["near 1", "near -1"])
@pytest.mark.parametrize("backend", FUSED)
def test_cosines_all_at_one_end_of_a_high_scale_are_right(backend, sign, form, device):
    """2^(logit - the highest logit there can be) is no fp32 number for any of them where all are near -1."""
    usable(backend, device)
    generator = torch.Generator().manual_seed(3)
    centre = F.normalize(torch.randn(40, generator=generator), dim=0)
    regions, texts = (
        (side * centre + 0.01 * torch.randn(140, 40, generator=generator)).to(device) for side in (sign, 1)
    )
    for dtype in DTYPES:
        inputs = (regions.to(dtype), texts.to(dtype), torch.tensor(100.0, device=device))
        check(inputs, form, backend, threshold=None, bias=-100.0 * sign)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_a_filter_that_drops_nothing_changes_nothing(backend, dtype, form, device):
    """No two captions alike, and rows that fill whole tiles: most of these have not a pair to drop."""
    usable(backend, device)
    generator = torch.Generator().manual_seed(2)
    regions, texts = torch.randn(2, 256, 40, generator=generator).to(device, dtype).unbind(0)
    inputs = (regions, texts, torch.tensor(20.0, device=device))
    with_filter, without = (run(inputs, form, backend, threshold=threshold) for threshold in (0.95, None))
    for name, a, b in zip(NAMES, with_filter, without, strict=False):
        assert torch.equal(a, b), name
    check(inputs, form, backend, threshold=0.95)


@pytest.mark.parametrize("backend", FUSED)
def test_rows_whose_cosines_rounding_puts_above_one_do_not_overflow_a_high_scale(backend, device):
    """Equal units of bf16 whose square is 1.005: at a scale of 2000 their logits are 10 above the scale."""
    usable(backend, device)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4096, 16, generator=generator)
    squares = F.normalize(rows, dim=-1).bfloat16().double().square().sum(-1)
    row = rows[squares.argmax()].to(device, torch.bfloat16)
    assert squares.max() > 1.003
    regions = torch.stack([row, row, -row, row])
    found, *grads = run((regions, regions, torch.tensor(2000.0, device=device)), "contrastive", backend, threshold=None)
    wanted = 3 / 4 * math.log(3)  # three rows have three equal highest logits each, one has its own alone
    # Logits of 2900 in powers of two are good to 1.2e-4 in fp32, as what they are multiplied with is.
    torch.testing.assert_close(found.double().item(), wanted, rtol=0, atol=2e-4)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", FUSED)
def test_fp16_keeps_weights_that_it_could_not_hold_itself(backend, device):
    """Of the sigmoid form at a bias of -18 every weight is 1.5e-8; fp16's least number is 6e-8."""
    usable(backend, device)
    kernels = importlib.import_module(f"locfast.kernels.region_contrastive_loss.{backend}")
    generator = torch.Generator().manual_seed(1)
    regions, texts = torch.randn(2, 70, 32, generator=generator).to(device, torch.float16).unbind(0)
    valid = torch.ones(70, dtype=torch.bool, device=device)
    region_units, text_units, _, _, valid = kernels.prepare(regions, texts, valid, torch.float16)
    scale, bias = (torch.tensor(x, dtype=torch.float64, device=device) for x in (0.0, -18.0))
    pairs = Block(region_units, text_units, text_units, valid, valid, False, scale, bias, None)
    sums = torch.zeros(len(valid), dtype=torch.float64, device=device)
    found = torch.zeros(region_units.shape, device=device)
    kernels.gradients(pairs, sums, sums, found, False)
    wanted = math.exp(-18) * text_units.float().sum(0)
    # A weight of 2.5e-4 in fp16's units is good to 2^-11.
    torch.testing.assert_close(found[:70] / weight_unit(torch.float16), wanted.expand(70, -1), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_triton_s_passes_are_right_over_cosines_that_a_matrix_product_left_in_memory(form, device, monkeypatch):
    """In panels of 256 rows, with the filter's bits kept and decided anew, and where the online form is wanted."""
    usable("triton", device)
    monkeypatch.setitem(tiles.COSINES, "from", "cublas")
    monkeypatch.setitem(tiles.PANEL, "rows", 256)
    monkeypatch.setattr(block, "TILE", (256, 64))
    inputs = make_inputs(300, 33, torch.float32, device, 20.0)
    for keep in (True, False):
        check(inputs, form, "triton", keep_filter=keep)
    _, texts, _ = make_inputs(30, 33, torch.float32, device)
    check((-texts, texts, torch.tensor(100.0, device=device)), form, "triton", threshold=None, bias=100.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_a_negative_scale_only_turns_the_cosines_round(backend, form, device):
    usable(backend, device)
    regions, texts, scale = make_inputs(70, 33, torch.float32, device, 100.0)
    check((regions, texts, -scale), form, backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_equal_captions_are_no_negatives_of_each_other(backend, form, device):
    """Every negative is filtered. What is left of InfoNCE is nothing, and of SigLIP's loss the positives."""
    usable(backend, device)
    regions, texts, scale = make_inputs(140, 33, torch.float32, device)
    texts = texts[:1].expand_as(texts)
    found = run((regions, texts, scale), form, backend)
    if form == "contrastive":
        assert found[0].abs() <= 1e-6
        assert all(x.abs().max() <= 1e-5 for x in found[1:])
    else:
        positives = scale * F.cosine_similarity(regions, texts) + BIAS
        torch.testing.assert_close(found[0], -F.logsigmoid(positives).mean(), rtol=1e-5, atol=0)
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_no_valid_row_means_no_loss_and_no_gradient(backend, form, device):
    usable(backend, device)
    regions, texts, scale = make_inputs(5, 8, torch.float32, device)
    valid = torch.zeros(5, dtype=torch.bool, device=device)
    for x in (regions, torch.full_like(regions, float("nan"))):
        for name, value in zip(NAMES, run((x, texts, scale), form, backend, valid), strict=False):
            assert not value.any(), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_rows_of_zeros_have_a_cosine_of_zero_with_everything(backend, form, device):
    """As F.normalize has it, and a gradient of 1e12 times another's unit row; one below 1e-12 becomes no unit."""
    usable(backend, device)
    regions, texts, scale = make_inputs(12, 8, torch.float32, device)
    regions[3], texts[5] = 0, 0
    regions[7] *= 1e-14
    found, wanted = run((regions, texts, scale), form, backend), run((regions, texts, scale), form, "reference")
    for name, a, b in zip(NAMES, found, wanted, strict=False):
        assert a.isfinite().all(), name
        # Of fp32 sums at most 12 terms of either size, hence a few units in the last place of the largest.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item(), msg=name)
