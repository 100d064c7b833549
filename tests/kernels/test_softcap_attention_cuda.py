"""The compiled soft-capped attention: on a GPU its kernels, on a CPU the same source in lock step."""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from locfast.kernels import _backend
from locfast.kernels.softcap_attention import cuda, softcap_attention

from .attention_reference import rounding_only_what_must_be
from .tolerance import assert_close_as_dtype_allows, assert_no_lost_gradient

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 72, 80, 96, 128)
TOKENS = (1, 50, 196, 197, 257, 577, 729)
CAPS = (15.0, 30.0, 50.0, 80.0, 200.0, None)
NAMES = ("output", "q.grad", "k.grad", "v.grad")
LITTLE = {64: 40 * 1024, 72: 48 * 1024, 80: 48 * 1024, 96: 72 * 1024, 128: 72 * 1024}
"""Shared memory in which two chunks of keys fit, but not all of 196 keys: by head dim."""

attention = functools.partial(softcap_attention, backend="cuda")


@pytest.fixture(autouse=True)
def _built(device) -> None:
    if reason := cuda.probe(device, torch.bfloat16):
        pytest.skip(reason)


FORMS = pytest.mark.parametrize("streams", [False, True], ids=["whole heads", "streams"])


@pytest.fixture
def stream(monkeypatch):
    """Call it with whether keys shall stream through little shared memory, the head dim and the number of tokens."""

    def choose(streams: bool, head_dim: int, tokens: int) -> None:
        if streams:
            assert 4 * tokens * head_dim > LITTLE[head_dim], "so few keys never stream"
            monkeypatch.setattr(cuda, "SHARED_BYTES", LITTLE[head_dim])

    return choose


def make_inputs(batch, heads, tokens, head_dim, dtype, cap, device, seed=0, keys=None) -> list[Tensor]:
    """q, k, v and the output's gradient; logits (scale D^-0.5) spread to twice the cap: both sides of its knee."""
    generator = torch.Generator().manual_seed(seed)
    spread = 1.0 if cap is None else min(cap, 50.0) ** 0.5

    def draw(length: int, size: float) -> Tensor:
        return (size * torch.randn(batch, heads, length, head_dim, generator=generator)).to(dtype).to(device)

    q, k, v = draw(tokens, spread), draw(keys or tokens, spread), draw(keys or tokens, 1.0)
    return [q, k, v, draw(tokens, 1.0)]


def make_key_mask(batch: int, keys: int, device) -> Tensor:
    """About two thirds of the keys, 64 hidden in a row where there are as many; none at all for the last image."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(2)) < 0.66
    mask[0, 64:128] = False
    if batch > 1:
        mask[-1] = False
    return mask.to(device)


def gradients(function, inputs, grad) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def check(inputs, grad, softcap, key_mask=None) -> None:
    """Output and gradients as right as the dtype allows; see tolerance.py."""
    scale = inputs[0].shape[-1] ** -0.5
    given = dict(softcap=softcap, scale=scale, key_mask=key_mask)
    found = gradients(functools.partial(attention, **given), inputs, grad)
    same = gradients(functools.partial(rounding_only_what_must_be, **given), inputs, grad)
    reference = functools.partial(softcap_attention, backend="reference", **given)
    truth = gradients(reference, [t.double() for t in inputs], grad.double())
    for name, a, b, c in zip(NAMES, found, same, truth, strict=True):
        assert_close_as_dtype_allows(a, b, c, name)
        assert_no_lost_gradient(a, c, name)


@pytest.mark.parametrize(("tokens", "streams"), [(50, False), (197, False), (197, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_in_every_dtype(head_dim, dtype, tokens, streams, stream, device):
    stream(streams, head_dim, tokens)
    *inputs, grad = make_inputs(1, 2, tokens, head_dim, dtype, 30.0, device)
    check(inputs, grad, 30.0)


@pytest.mark.parametrize("head_dim", [8, 40, 88, 112])
def test_head_dims_between_the_common_ones(head_dim, device):
    *inputs, grad = make_inputs(1, 1, 50, head_dim, torch.bfloat16, 30.0, device)
    check(inputs, grad, 30.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "streams"), [(n, streams) for n in TOKENS for streams in (False, True) if n > 160 or not streams]
)
def test_every_length(tokens, streams, dtype, stream, device):
    stream(streams, 64, tokens)
    *inputs, grad = make_inputs(1, 1, tokens, 64, dtype, 50.0, device)
    check(inputs, grad, 50.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", CAPS)
@FORMS
def test_every_cap_in_every_dtype(streams, softcap, dtype, stream, device):
    stream(streams, 72, 196)
    *inputs, grad = make_inputs(1, 1, 196, 72, dtype, softcap, device)
    check(inputs, grad, softcap)


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
@pytest.mark.parametrize("softcap", [80.0, 200.0])
@pytest.mark.parametrize(("tokens", "streams"), [(50, False), (197, False), (197, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_which_one_key_takes_nearly_all_have_right_gradients(
    dtype, tokens, streams, softcap, masked, stream, device
):
    """Gradients of logits cancel there: with a delta from the rounded output, most of these seeds err too much."""
    stream(streams, 64, tokens)
    for seed in (1, 5, 9, 16, 20) if tokens == 50 else (4, 6, 8):
        *inputs, grad = make_inputs(1, 1, tokens, 64, dtype, softcap, device, seed)
        check(inputs, grad, softcap, make_key_mask(1, tokens, device) if masked else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_shape_of_so400m(dtype, device):
    *inputs, grad = make_inputs(1, 1, 729, 72, dtype, 50.0, device)
    check(inputs, grad, 50.0)


@pytest.mark.parametrize(
    ("queries", "keys", "streams"),
    [(1, 257, False), (257, 1, False), (33, 230, False), (230, 250, False), (230, 250, True)],
)
def test_queries_and_keys_of_different_number_with_a_key_mask(queries, keys, streams, stream, device):
    stream(streams, 64, min(queries, keys))
    *inputs, grad = make_inputs(2, 2, queries, 64, torch.bfloat16, 30.0, device, keys=keys)
    check(inputs, grad, 30.0, make_key_mask(2, keys, device))


STRIDES = {
    "contiguous": lambda t: t,
    "heads inside tokens": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of packed qkv": lambda t: torch.stack([t, t, t], dim=3)[:, :, :, 1],
    "broken innermost": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "one for all heads": lambda t: t[:, :1].expand(t.shape),
    "rows off 16-byte boundaries": lambda t: F.pad(t, (0, 1))[..., :-1],
    "base off a 16-byte boundary": lambda t: F.pad(t, (4, 4))[..., 4:-4],
}


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
@pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES.keys())
def test_every_stride_with_and_without_a_key_mask(stride, masked, device):
    *inputs, grad = make_inputs(2, 2, 50, 72, torch.bfloat16, 30.0, device)
    key_mask = make_key_mask(2, 100, device)[:, ::2] if masked else None
    check([stride(t) for t in inputs], stride(grad), 30.0, key_mask)


def test_a_packed_projection_is_read_where_it_lies(device):
    packed = torch.randn(2, 50, 3, 4, 64, device=device, dtype=torch.bfloat16)
    for t in packed.permute(2, 0, 3, 1, 4):
        assert cuda._aligned(t) is t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [30.0, 200.0, None])
@FORMS
def test_rows_without_a_key_give_zeros_and_hidden_tokens_may_hold_anything(streams, softcap, dtype, stream, device):
    stream(streams, 64, 197)
    q, k, v, grad = make_inputs(2, 1, 197, 64, dtype, 30.0, device)
    key_mask = make_key_mask(2, 197, device)
    hidden = ~key_mask[:, None, :, None].expand_as(k)
    op = functools.partial(attention, softcap=softcap, key_mask=key_mask)
    clean = gradients(op, (q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)), grad)
    broken = gradients(op, (q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf)), grad)
    assert all(torch.equal(a, b) for a, b in zip(clean, broken, strict=True))
    out, q_grad, k_grad, v_grad = clean
    assert (out[-1] == 0).all() and (q_grad[-1] == 0).all()
    assert (k_grad[hidden] == 0).all() and (v_grad[hidden] == 0).all()
    _, lse, _ = cuda.softcap_attention(q, k, v, softcap, 0.125, key_mask)
    assert lse[0].isfinite().all() and (lse[-1] == torch.inf).all()


@pytest.mark.parametrize("softcap", [30.0, 200.0])
@FORMS
def test_nan_in_a_kept_key_is_seen_in_the_output_and_in_every_gradient_of_its_image(streams, softcap, stream, device):
    stream(streams, 64, 197)
    *inputs, grad = make_inputs(2, 1, 197, 64, torch.bfloat16, 30.0, device)
    inputs[1][0, 0, 100, 3] = torch.nan
    for name, found in zip(NAMES, gradients(functools.partial(attention, softcap=softcap), inputs, grad), strict=True):
        assert found[0].isnan().all() and found[1].isfinite().all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", CAPS)
def test_saturated_rows_with_large_values_stay_finite_over_8192_keys(softcap, dtype, device):
    """All logits 1e4 or more, values of size 100: the softmax of a constant row is their mean."""
    q, k = (torch.full((1, 1, n, 64), 40.0, device=device, dtype=dtype) for n in (16, 8192))
    values = torch.randn(1, 1, 8192, 64, generator=torch.Generator().manual_seed(0)).sign() * 100
    values[..., 0] = 100.0
    v = values.to(dtype).to(device)
    out, *grads = gradients(functools.partial(attention, softcap=softcap), (q, k, v), torch.ones_like(q))
    mean = v.double().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.double(), mean, rtol=8e-3, atol=0.05)
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(grads[2], torch.full_like(grads[2], 16 / 8192), rtol=8e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", CAPS)
def test_logits_of_ten_thousand_of_both_signs(softcap, dtype, device):
    *inputs, grad = make_inputs(1, 1, 50, 64, dtype, None, device)
    scale = 1e4 / 24  # products of unit normals over 64 dims reach about 24
    out, *grads = gradients(functools.partial(attention, softcap=softcap, scale=scale), inputs, grad)
    assert all(t.isfinite().all() for t in (out, *grads))
    expected = softcap_attention(*(t.double() for t in inputs), softcap=softcap, scale=scale, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


def tanh_of_the_op(x: Tensor) -> Tensor:
    """With one key, scale 1 and cap 1, the log-sum-exp of a row is the tanh of its product."""
    q = F.pad(x[None, None, :, None], (0, 7))
    key = F.pad(torch.ones(1, 1, 1, 1, dtype=x.dtype, device=x.device), (0, 7))
    return torch.ops.locfast_C.softcap_attention(q, key, key, 1.0, 1.0, None)[1].flatten().double()


def test_the_accurate_tanh_is_right_near_zero_and_rises_to_one(device):
    x = torch.arange(2**15 - 2**10, device=device).to(torch.int16).view(torch.float16)  # every finite one from 0 on
    found, truth = tanh_of_the_op(x), x.double().tanh()
    assert ((found - truth).abs() <= 4e-7 * truth + 1e-12).all()
    assert (found.diff() >= -1.2e-7).all() and found[-1].item() == pytest.approx(1.0, abs=1.2e-7)
    assert torch.equal(tanh_of_the_op(-x), -found)


@pytest.mark.parametrize("largest", [1.0, 8.0])
def test_the_hardware_tanh_errs_as_much_as_is_said_of_it(largest, device):
    x = torch.linspace(-largest, largest, 4001, device=device).bfloat16()
    # The log-sum-exp of a single key is 1 + log(exp(s - 1)): fp32's exponent and logarithm add about 3e-7.
    assert (tanh_of_the_op(x) - x.double().tanh()).abs().max() <= 2**-11 + 1e-6


@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_runs_give_the_same_bits(head_dim, device):
    *inputs, grad = make_inputs(2, 2, 120, head_dim, torch.bfloat16, 30.0, device)
    once, again = (gradients(functools.partial(attention, softcap=30.0), inputs, grad) for _ in range(2))
    for name, a, b in zip(NAMES, once, again, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("batch", "tokens", "keys"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)])
def test_no_images_and_no_tokens_are_no_error(batch, tokens, keys, device):
    q, grad = torch.randn(2, batch, 2, tokens, 16, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, 2, keys, 16, device=device, dtype=torch.bfloat16)
    found = gradients(functools.partial(attention, softcap=30.0), (q, k, v), grad)
    assert [t.shape for t in found] == [q.shape, q.shape, k.shape, v.shape]
    assert all((t == 0).all() for t in found)


def test_output_and_gradients_lie_as_projections_want_them(device):
    *inputs, grad = make_inputs(2, 3, 10, 16, torch.float16, 30.0, device)
    for t in gradients(functools.partial(attention, softcap=30.0), inputs, grad):
        assert t.transpose(1, 2).is_contiguous()


def test_ops_pass_opcheck(device):
    q, k, v, grad = make_inputs(2, 2, 6, 16, torch.bfloat16, 30.0, device)
    key_mask = make_key_mask(2, 6, device)
    forward, backward = torch.ops.locfast.softcap_attention, torch.ops.locfast.softcap_attention_backward
    inputs = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(forward.default, (*inputs, 30.0, 0.25, key_mask, None, False, "cuda"), rtol=0.02, atol=0.02)
    q, k, v = (t.detach() for t in inputs)
    saved = forward(q, k, v, 30.0, 0.25, key_mask, None, False, "cuda")
    torch.library.opcheck(
        backward.default, (grad, q, k, v, *saved, 30.0, 0.25, key_mask, None, False, "cuda"), rtol=0.02, atol=0.02
    )


def test_compiled_model_takes_the_op_without_a_graph_break(device):
    q, k, v, _ = make_inputs(1, 2, 20, 64, torch.bfloat16, 30.0, device)
    compiled = torch.compile(lambda *t: attention(*t, softcap=30.0) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), 2 * attention(q, k, v, softcap=30.0))


def test_other_dtypes_are_refused_with_the_reason(device):
    for dtype in (torch.float32, torch.float64):
        q = torch.zeros(1, 1, 4, 64, device=device, dtype=dtype)
        with pytest.raises(_backend.BackendError, match="bfloat16 and float16, not float"):
            attention(q, q, q, softcap=30.0)


@pytest.mark.parametrize("head_dim", [20, 136, 256])
def test_other_head_dims_are_refused_with_the_way_out(head_dim, device):
    q = torch.zeros(1, 1, 4, head_dim, device=device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"multiples of 8 up to 128.*{head_dim}.*tiled"):
        attention(q, q, q, softcap=30.0)


MISTAKES = {
    "head dims": (dict(q=torch.zeros(1, 1, 4, 56).bfloat16()), "do not fit at dimension 3: 56, 64 and 64"),
    "lengths": (dict(k=torch.zeros(1, 1, 5, 64).bfloat16()), "do not fit at dimension 2: 4, 5 and 4"),
    "dtypes": (dict(v=torch.zeros(1, 1, 4, 64).half()), "v must have the dtype"),
    "alignment": (dict(q=torch.zeros(1, 1, 5, 68).bfloat16()[:, :, :4, :64]), "multiples of 16 bytes"),
    "dimensions": (dict(q=torch.zeros(1, 4, 64).bfloat16()), r"q must be \[B, H, T, D\]"),
    "key mask": (dict(key_mask=torch.ones(1, 5, dtype=torch.bool)), r"key_mask must be \[B, Tk\]"),
    "cap": (dict(softcap=0.0), "positive and finite"),
    "shared memory": (dict(shared_bytes=1000), "1000 bytes of shared memory"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_the_compiled_op_itself_says_what_does_not_fit(change, message):
    q = torch.zeros(1, 1, 4, 64).bfloat16()
    inputs = dict(q=q, k=q, v=q, softcap=30.0, scale=1.0, key_mask=None, shared_bytes=0) | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.locfast_C.softcap_attention(**inputs)


@pytest.mark.gpu
@FORMS
def test_a_cuda_graph_replays_forward_and_backward(streams, stream, device):
    stream(streams, 64, 197)
    given = make_inputs(1, 2, 197, 64, torch.bfloat16, 30.0, device)
    q, k, v, grad = (torch.zeros_like(t) for t in given)

    def step() -> tuple[Tensor, ...]:
        saved = cuda.softcap_attention(q, k, v, 30.0, 0.125, None)
        return *saved, *cuda.softcap_attention_backward(grad, q, k, v, *saved, 30.0, 0.125, None)

    step()  # loads the kernels, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for to, value in zip((q, k, v, grad), given, strict=True):
        to.copy_(value)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_the_last_gpu_takes_what_lies_there_whatever_the_current_one(device):
    *inputs, grad = make_inputs(1, 2, 197, 64, torch.bfloat16, 30.0, "cpu")
    op = functools.partial(attention, softcap=30.0)
    with torch.cuda.device(0):
        here, there = (
            gradients(op, [t.to(place) for t in inputs], grad.to(place))
            for place in ("cuda:0", f"cuda:{torch.cuda.device_count() - 1}")
        )
    for name, a, b in zip(NAMES, here, there, strict=True):  # two models may differ in shared memory, and so in form
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=2**-7, atol=2**-7 * float(b.abs().max()), msg=name)


@pytest.mark.gpu
@pytest.mark.slow
def test_addresses_beyond_two_to_the_31_elements(device):
    tokens, head_dim = 256, 64
    batch = 2**31 // (tokens * head_dim) + 2
    q = torch.zeros(batch, 1, tokens, head_dim, dtype=torch.bfloat16, device=device)
    q[-1] = torch.randn(tokens, head_dim, device=device)
    op = functools.partial(attention, softcap=30.0)
    all_images = gradients(op, (q, q, q), q)
    last = gradients(op, (q[-1:], q[-1:], q[-1:]), q[-1:])
    for name, found, expected in zip(NAMES, all_images, last, strict=True):
        assert torch.equal(found[-1:], expected), name
        assert (found[:-1] == 0).all(), name
