"""The region losses' manners: autograd, memory, layouts, autocast, torch.compile, FLOPs, and what they refuse."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from locfast.kernels.region_contrastive_loss import region_contrastive_loss, region_sigmoid_loss, tiled

from .region_loss_checks import BIAS, FORMS, FUSED, NAMES, THRESHOLD, Inputs, a_third_invalid, make_inputs, run, usable

ALL = ("reference", *FUSED)


def small(device, dtype=torch.float32, rows=37, width=24) -> Inputs:
    return make_inputs(rows, width, dtype, device)


def assert_same_bits(a, b):
    for name, x, y in zip(NAMES, a, b, strict=False):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_strided_inputs_give_what_contiguous_ones_give(backend, form, device):
    usable(backend, device)
    regions, texts, scale = small(device, rows=70, width=48)
    mask = torch.arange(140, device=device) % 6 != 2
    strided = {
        "transposed": (regions.T.contiguous().T, texts.T.contiguous().T, mask[:70]),
        "sliced": (regions[::2, 5:40], texts[::2, 5:40], mask[:70:2]),
        "one side transposed": (regions.T.contiguous().T, texts, mask[::2]),
        "expanded": (regions, texts[:1].expand_as(texts), mask[:1].expand(70)),
    }
    for name, (r, t, valid) in strided.items():
        found = run((r, t, scale), form, backend, valid)
        expected = run((r.contiguous(), t.contiguous(), scale), form, backend, valid.contiguous())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item(), msg=f"{name}, {form}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_runs_give_the_same_bits_and_a_kept_filter_those_of_a_fresh_one(backend, form, device):
    usable(backend, device)
    for dtype in (torch.float32, torch.bfloat16):
        regions, texts, valid = a_third_invalid(*make_inputs(150, 33, dtype, device)[:2])
        inputs = (regions, texts, torch.tensor(30.0, device=device))
        first = run(inputs, form, backend, valid)
        assert_same_bits(first, run(inputs, form, backend, valid))
        assert_same_bits(first, run(inputs, form, backend, valid, keep_filter=False))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_a_gradient_is_made_where_one_is_required_and_nowhere_else(backend, form, device):
    usable(backend, device)
    inputs = small(device)
    everything = run(inputs, form, backend)[1:]
    for wanted in ((0,), (1,), (2,), (0, 2), (1, 2), *([(3,), (0, 3)] if form == "sigmoid" else [])):
        leaves = [x.detach().clone() for x in (*inputs, torch.full_like(inputs[2], BIAS))]
        for i in wanted:
            leaves[i].requires_grad_()
        options = dict(logit_scale=leaves[2], filter_threshold=THRESHOLD, backend=backend)
        if form == "contrastive":
            loss = region_contrastive_loss(*leaves[:2], **options)
        else:
            loss = region_sigmoid_loss(*leaves[:2], logit_bias=leaves[3], **options)
        (48 * loss).backward()
        for i, leaf in enumerate(leaves):
            told = f"{NAMES[i + 1]} where {wanted} are required"
            if i not in wanted:
                assert leaf.grad is None, told
            elif i == 2:  # one number by sums over texts, or over regions where texts want no gradient
                torch.testing.assert_close(leaf.grad, everything[i], rtol=2e-6, atol=0, msg=told)
            else:
                assert torch.equal(leaf.grad, everything[i]), told


@pytest.mark.parametrize("backend", ALL)
def test_the_gradient_has_the_input_s_dtype_and_the_loss_is_fp32(backend, device):
    usable(backend, device)
    loss, *grads = run(small(device, torch.bfloat16), "sigmoid", backend)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("backend", ALL)
def test_scale_and_bias_may_be_plain_numbers(backend, device):
    usable(backend, device)
    regions, texts, _ = small(device)
    as_numbers, as_tensors = (
        region_sigmoid_loss(regions, texts, logit_scale=make(10.0), logit_bias=make(-2.5), backend=backend)
        for make in (float, lambda x: torch.tensor([x], device=device))  # shape [1], as some models keep theirs
    )
    assert torch.equal(as_numbers, as_tensors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_autocast_rounds_unit_rows_to_its_dtype_and_leaves_gradients_wide(backend, form, device):
    usable(backend, device)
    inputs = small(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss, *grads = run(inputs, form, backend)
    assert [x.dtype for x in (loss, *grads[:2])] == [torch.float32] * 3
    exact = run(inputs, form, backend)[0]
    assert (loss != exact) == (backend != "reference")  # which rounds for the filter alone
    # Parts of a unit row err by 2^-9 in bf16, a cosine by 2^-8 at most, the loss by twice the scale times that.
    torch.testing.assert_close(loss, exact, rtol=0, atol=2 * 10 * 2**-8)


@pytest.mark.parametrize("backend", FUSED)
def test_tf32_that_the_program_allows_changes_no_bit(backend, device):
    usable(backend, device)
    inputs, before = small(device), torch.get_float32_matmul_precision()
    wanted = run(inputs, "contrastive", backend)
    torch.set_float32_matmul_precision("high")
    try:
        assert_same_bits(run(inputs, "contrastive", backend), wanted)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_a_second_derivative_is_refused_but_by_the_reference(backend, form, device):
    usable(backend, device)
    regions, texts, scale = small(device, rows=4)
    texts.requires_grad_()
    bias = {} if form == "contrastive" else {"logit_bias": -2.0}
    loss = (region_sigmoid_loss if bias else region_contrastive_loss)(
        regions, texts, logit_scale=scale, backend=backend, **bias
    )
    (grad,) = torch.autograd.grad(loss, texts, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_ops_pass_opcheck(backend, form, layout, device):
    usable(backend, device)
    regions, texts, scale = small(device, rows=9, width=8)
    if layout == "columns":
        regions, texts = regions.T.contiguous().T, texts.T.contiguous().T
    bias = None if form == "contrastive" else torch.tensor(BIAS, device=device)
    valid = torch.arange(9, device=device) != 4
    needing = [x.clone().requires_grad_() for x in (regions, texts, scale)]
    arguments = (valid, 0.9, torch.float32, "", "auto", True, backend)
    torch.library.opcheck(torch.ops.locfast.region_contrastive_loss.default, (*needing, bias, *arguments))
    saved = torch.ops.locfast.region_contrastive_loss(regions, texts, scale, bias, *arguments)[1:]
    for needs in ([True, True, True, bias is not None], [False, True, False, False], [True, False, False, False]):
        torch.library.opcheck(
            torch.ops.locfast.region_contrastive_loss_backward.default,
            (torch.tensor(0.5, device=device), regions, texts, scale, bias, *saved, 0.9, needs, "", "auto", backend),
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_compiled_it_is_one_graph_and_equals_eager(backend, form, device):
    usable(backend, device)
    inputs = small(device)

    def function(regions, texts, scale):
        shared = dict(logit_scale=scale.exp(), filter_threshold=0.9, backend=backend)
        if form == "contrastive":
            return region_contrastive_loss(regions * 2, texts, **shared)
        return region_sigmoid_loss(regions * 2, texts, logit_bias=-2.0, **shared)

    def step(function):
        leaves = [x.detach().requires_grad_() for x in (*inputs[:2], inputs[2].log())]
        loss = function(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    try:
        assert_same_bits(step(torch.compile(function, backend="aot_eager", fullgraph=True)), step(function))
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("backend", FUSED)
def test_flops_are_two_products_forward_and_three_backward(backend, device):
    usable(backend, device)
    regions, texts, scale = small(device)
    product, filtered = 2 * 37 * 37 * 24, 4 * 37 * 37 * 24
    for threshold, forward in ((0.9, filtered), (None, product)):
        leaves = regions.clone().requires_grad_(), texts.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            loss = region_contrastive_loss(*leaves, logit_scale=scale, filter_threshold=threshold, backend=backend)
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert counter.get_total_flops() == 3 * product


@pytest.mark.parametrize("form", FORMS)
def test_panels_of_any_size_give_the_same_loss(form, monkeypatch, device):
    inputs = make_inputs(70, 33, torch.float32, device)
    wanted = run(inputs, form, "tiled")
    for rows in (1, 3, 69):
        monkeypatch.setitem(tiled.MAX_PANEL, device.type, rows * 70)
        for name, a, b in zip(NAMES, run(inputs, form, "tiled"), wanted, strict=False):
            # Sums of 70 terms in another order: a few units in the last place of the largest.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item(), msg=f"{name}, {rows} rows")


@pytest.mark.parametrize(
    ("change", "wanted", "found"),
    [
        (dict(regions=torch.zeros(4, 2, 8)), r"\[R, E\] both", r"\[4, 2, 8\]"),
        (dict(texts=torch.zeros(5, 8)), r"\[R, E\] both", r"\[4, 8\] and \[5, 8\]"),
        (dict(regions=torch.zeros(4, 0), texts=torch.zeros(4, 0)), "not empty", r"\[4, 0\]"),
        (
            dict(regions=torch.zeros(1, 1).expand(2**20 + 1, 1), texts=torch.zeros(1, 1).expand(2**20 + 1, 1)),
            "2.20",
            "1048577",
        ),
        (dict(texts=torch.zeros(4, 8).double()), "share one of fp64, fp32, fp16 and bf16", "float32 and torch.float64"),
        (dict(regions=torch.zeros(4, 8).int(), texts=torch.zeros(4, 8).int()), "fp16 and bf16", "int32"),
        (dict(texts=torch.zeros(4, 8, device="meta")), "on one device", "cpu and meta"),
        (dict(logit_scale=torch.ones(4)), "logit_scale must be one floating number", r"\[4\]"),
        (dict(logit_scale=torch.ones((), dtype=torch.int64)), "logit_scale must be one floating number", "int64"),
        (dict(logit_bias=torch.ones(4)), "logit_bias must be one floating number", r"\[4\]"),
        (dict(filter_threshold=1.5), "-1 to 1, or None", "1.5"),
        (dict(valid=torch.ones(4)), r"bool \[R\] = \[4\]", "float32"),
        (dict(valid=torch.ones(5, dtype=torch.bool)), r"bool \[R\] = \[4\]", r"\[5\]"),
        (dict(exchange="star"), "auto, ring, gather", "star"),
        (dict(regions=[[1.0]]), "regions must be a tensor", "list"),
        (dict(valid=[True] * 4), "valid must be a tensor", "list"),
        (dict(logit_scale="10"), "logit_scale must be a number", "'10'"),
        (dict(logit_scale=None), "logit_scale must be a number", "None"),
        (dict(filter_threshold=True), "-1 to 1, or None", "True"),
        (dict(filter_threshold=float("nan")), "-1 to 1, or None", "nan"),
        (dict(group=1), "process group that this rank belongs to", "1"),
        (dict(keep_filter="no"), "True or False", "'no'"),
        (dict(regions=torch.zeros(4, 2**16 + 1), texts=torch.zeros(4, 2**16 + 1)), "width 2.16", "65537"),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_wanted_and_found(change, wanted, found):
    inputs = dict(regions=torch.zeros(4, 8), texts=torch.zeros(4, 8), logit_scale=10.0, logit_bias=-2.0)
    with pytest.raises(ValueError, match=f"(?s){wanted}.*{found}"):
        region_sigmoid_loss(**(inputs | change))
    if "logit_bias" not in change:
        del inputs["logit_bias"]
        with pytest.raises(ValueError, match=f"(?s){wanted}.*{found}"):
            region_contrastive_loss(**(inputs | change))


def test_columns_are_cut_so_that_no_program_has_much_more_to_do_than_its_share():
    """Of the tiles that a program of 132 works on at R 8192 to 131072, at most 15 % more than a fair share."""
    triton = pytest.importorskip("locfast.kernels.region_contrastive_loss.triton")
    for regions in (8192, 16384, 32768, 65536, 131072):
        blocks, tiles = regions // 128, regions // 256
        segments = triton._segments(blocks, tiles, 132)
        busiest = -(-blocks * segments // 132) * -(-tiles // segments)
        assert busiest <= 1.15 * blocks * tiles / 132, regions
    assert triton._segments(1, 1, 132) == 1
