"""Soft-capped attention: every backend of this machine against the reference, in values, gradients and manners."""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from locfast.kernels import _backend
from locfast.kernels.softcap_attention import softcap_attention, tiled

from .attention_reference import rounding_only_what_must_be
from .tolerance import assert_close_as_dtype_allows, assert_no_lost_gradient

CAP = 5.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 72, 80, 96, 128)
TOKENS = (1, 50, 196, 197, 257, 577, 729)
CAPS = (15.0, 30.0, 50.0, 80.0, 200.0, None)
NAMES = ("output", "q.grad", "k.grad", "v.grad", "bias.grad")


@pytest.fixture(params=["tiled", "triton"])
def backend(request, device) -> str:
    """Every backend with a backward of its own, but the compiled one, which has a file of tests of its own."""
    if request.param == "triton" and (reason := _backend.triton_probe(device, torch.float32)):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def large_tiles(monkeypatch):
    """In the interpreter a tile costs the same whatever its size: larger ones where the default's are not the point."""
    if _backend.interpreting():
        from locfast.kernels.softcap_attention import triton

        for kernel in ("forward", "backward_q", "backward_kv"):
            monkeypatch.setitem(triton.tiles_override, kernel, triton.Tiles(256, 256, 8, 2))


def make_inputs(batch, heads, tokens, head_dim, dtype, cap, device, seed=0, keys=None) -> list[Tensor]:
    """q, k, v and the output's gradient; logits (scale D^-0.5) spread to twice the cap: both sides of its knee."""
    generator = torch.Generator().manual_seed(seed)
    spread = 1.0 if cap is None else min(cap, 50.0) ** 0.5

    def draw(length: int, size: float) -> Tensor:
        return (size * torch.randn(batch, heads, length, head_dim, generator=generator)).to(dtype).to(device)

    q, k, v = draw(tokens, spread), draw(keys or tokens, spread), draw(keys or tokens, 1.0)
    return [q, k, v, draw(tokens, 1.0)]


def make_bias(*shape: int, device="cpu", dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


def make_key_mask(batch: int, keys: int, device="cpu") -> Tensor:
    """About two thirds of the keys; none at all for the last image."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(2)) < 0.66
    mask[-1] = False
    return mask.to(device)


def gradients(function, inputs, grad):
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [t for t in inputs if t is not None], grad)]


def check(inputs, grad, softcap, backend, bias=None, scale=None, key_mask=None):
    """Output and gradients as right as the dtype allows; see tolerance.py."""
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale

    def op(name):
        return lambda q, k, v, b: softcap_attention(
            q, k, v, softcap=softcap, scale=scale, bias=b, key_mask=key_mask, backend=name
        )

    found = gradients(op(backend), [*inputs, bias], grad)
    same = gradients(
        lambda q, k, v, b: rounding_only_what_must_be(q, k, v, softcap, scale, b, key_mask), [*inputs, bias], grad
    )
    wide = [None if t is None else t.double() for t in (*inputs, bias)]
    truth = gradients(op("reference"), wide, grad.double())
    for name, a, b, c in zip(NAMES, found, same, truth, strict=False):
        assert_close_as_dtype_allows(a, b, c, name)
        assert_no_lost_gradient(a, c, name)


@pytest.fixture(params=["one block", "several blocks"])
def blocks(request, monkeypatch):
    if request.param == "several blocks":
        monkeypatch.setattr(tiled, "MAX_BLOCK_SCORES", 1)  # then blocks have 16 rows, the least


def test_reference_is_the_equation_written_as_a_loop():
    q, k, v, _ = make_inputs(1, 2, 5, 4, torch.float64, CAP, "cpu", keys=6)
    bias = make_bias(2, 5, 6, dtype=torch.float64)
    key_mask = torch.tensor([[True, True, False, True, True, True]])
    out = softcap_attention(q, k, v, softcap=CAP, scale=0.3, bias=bias, key_mask=key_mask, backend="reference")
    kept = [0, 1, 3, 4, 5]
    for h in range(2):
        for i in range(5):
            logits = torch.stack(
                [CAP * torch.tanh((q[0, h, i] @ k[0, h, j] * 0.3 + bias[h, i, j]) / CAP) for j in kept]
            )
            weights = logits.exp() / logits.exp().sum()
            torch.testing.assert_close(out[0, h, i], weights @ v[0, h, kept], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_in_every_dtype(head_dim, dtype, backend, device):
    *inputs, grad = make_inputs(2, 2, 50, head_dim, dtype, CAP, device)
    check(inputs, grad, CAP, backend)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_length_under_every_cap(tokens, softcap, backend, device, request):
    dtype = torch.float32 if backend == "tiled" else torch.bfloat16
    if tokens > 300 and softcap not in (30.0, None):
        request.getfixturevalue("large_tiles")
    *inputs, grad = make_inputs(1, 1 if tokens > 100 else 2, tokens, 64, dtype, softcap, device)
    check(inputs, grad, softcap, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", CAPS)
def test_every_cap_in_the_other_dtypes(softcap, dtype, backend, device):
    *inputs, grad = make_inputs(1, 1, 65, 72, dtype, softcap, device)
    check(inputs, grad, softcap, backend)


@pytest.mark.parametrize("softcap", [1e-3, 1e4, 1e6, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_caps_far_below_and_above_the_logits(softcap, dtype, backend, device):
    *inputs, grad = make_inputs(1, 1, 40, 64, dtype, 4.0, device)
    check(inputs, grad, softcap, backend)


@pytest.mark.parametrize("head_dim", [1, 8, 17, 20, 33, 40, 112, 200, 256])
def test_uncommon_head_dims(head_dim, backend, device):
    """Narrower than a tensor core's tile, no multiple of 16 bytes, two parts of which one is padded, widest."""
    *inputs, grad = make_inputs(1, 2, 50, head_dim, torch.bfloat16, CAP, device)
    check(inputs, grad, CAP, backend)


@pytest.mark.parametrize(("queries", "keys"), [(1, 50), (50, 1), (33, 130), (130, 33)])
def test_queries_and_keys_of_different_number(queries, keys, backend, device):
    *inputs, grad = make_inputs(2, 2, queries, 64, torch.bfloat16, CAP, device, keys=keys)
    check(inputs, grad, CAP, backend, key_mask=make_key_mask(2, keys, device))


def test_gradients_are_right_where_logits_lie_far_below_the_cap(backend, device):
    """A tanh that is only absolutely accurate would show here: logits of size 1 under a cap of 200."""
    for dtype in DTYPES:
        *inputs, grad = make_inputs(1, 1, 65, 64, dtype, None, device)
        check(inputs, grad, 200.0, backend)


@pytest.mark.parametrize("tokens", [1, 33, 65])
def test_blocks_of_rows_change_nothing(tokens, blocks, device):
    *inputs, grad = make_inputs(2, 2, tokens, 32, torch.bfloat16, CAP, device)
    check(inputs, grad, CAP, "tiled", bias=make_bias(1, 2, tokens, tokens, device=device))


BIASES = {
    "none": None,
    "full": (2, 2, 50, 50),
    "one for all images": (1, 2, 50, 50),
    "one for all queries": (2, 1, 1, 50),
    "two dimensions": (50, 50),
}
STRIDES = {
    "contiguous": lambda t: t,
    "heads inside tokens": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of packed qkv": lambda t: torch.stack([t, t, t], dim=3)[:, :, :, 1],
    "broken innermost": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "one for all heads": lambda t: t[:, :1].expand(t.shape),
    "odd": lambda t: F.pad(t, (0, 1))[..., :-1],
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
@pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES.keys())
def test_every_stride_with_every_bias(stride, bias, device, monkeypatch):
    monkeypatch.setattr(tiled, "MAX_BLOCK_SCORES", 1)
    *inputs, grad = make_inputs(2, 2, 50, 64, torch.float32, CAP, device)
    values = None if bias is None else make_bias(*bias, device=device)
    check([stride(t) for t in inputs], stride(grad), CAP, "tiled", bias=values)


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
@pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES.keys())
def test_every_stride_with_every_key_mask(stride, masked, backend, device):
    *inputs, grad = make_inputs(2, 2, 50, 72, torch.bfloat16, CAP, device)
    key_mask = make_key_mask(2, 50, device) if masked else None
    check([stride(t) for t in inputs], stride(grad), CAP, backend, key_mask=key_mask)


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton", "auto"])
@pytest.mark.parametrize("softcap", [CAP, 200.0, None])
def test_rows_without_a_key_give_zeros_and_hidden_tokens_may_hold_anything(softcap, backend, device):
    q, k, v, grad = make_inputs(2, 2, 20, 16, torch.float32, CAP, device)
    key_mask = make_key_mask(2, 20, device)
    hidden = ~key_mask[:, None, :, None].expand_as(k)
    broken = [torch.where(hidden, torch.nan, t) for t in (k, v)]
    op = functools.partial(softcap_attention, softcap=softcap, key_mask=key_mask)
    found = gradients(functools.partial(op, backend=backend), (q, *broken), grad)
    clean = [torch.where(hidden, 0.0, t) for t in (k, v)]
    expected = gradients(functools.partial(op, backend="reference"), (q, *clean), grad)
    for name, a, b in zip(NAMES, found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    out, q_grad, k_grad, v_grad = found
    assert (out[-1] == 0).all() and (q_grad[-1] == 0).all()
    assert (k_grad[hidden] == 0).all() and (v_grad[hidden] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [30.0, 50.0, 80.0, None])
def test_saturated_rows_with_large_values_stay_finite_over_8192_keys(softcap, dtype, backend, device, large_tiles):
    """All logits 1e4, values of size 100: the softmax of a constant row is their mean."""
    size = 100.0 * 2.0**0.5  # q k^T / 4 is 16 size^2 / 4: logits of 8e4 where the dtype's products reach that far
    q = torch.full((1, 1, 16, 16), size, device=device, dtype=dtype)
    k = torch.full((1, 1, 8192, 16), size, device=device, dtype=dtype)
    values = torch.randn(1, 1, 8192, 16, generator=torch.Generator().manual_seed(0)).sign() * 100
    values[..., 0] = 100.0
    v = values.to(dtype).to(device)
    out, *grads = gradients(
        lambda *t: softcap_attention(*t, softcap=softcap, backend=backend), (q, k, v), torch.ones_like(q)
    )
    mean = v.double().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.double(), mean, rtol=2e-3 if dtype == torch.float32 else 8e-3, atol=0.05)
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(grads[2], torch.full_like(grads[2], 16 / 8192), rtol=8e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", CAPS)
def test_logits_of_ten_thousand_of_both_signs(softcap, dtype, backend, device):
    *inputs, grad = make_inputs(1, 1, 50, 64, dtype, 1.0, device)
    scale = 1e4 / 8 / 3  # products of unit normals over 64 dims reach about 24
    out, *grads = gradients(
        lambda *t: softcap_attention(*t, softcap=softcap, scale=scale, backend=backend), inputs, grad
    )
    wide = [t.double() for t in inputs]
    expected = softcap_attention(*wide, softcap=softcap, scale=scale, backend="reference")
    assert all(t.isfinite().all() for t in (out, *grads))
    if softcap is not None:  # without a cap rows are one-hot, and two logits may differ by less than fp32 holds
        torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.slow
def test_addresses_beyond_two_to_the_31_elements(backend, device):
    tokens, head_dim = 256, 64
    batch = 2**31 // (tokens * head_dim) + 2
    q = torch.zeros(batch, 1, tokens, head_dim, dtype=torch.bfloat16, device=device)
    q[-1] = torch.randn(tokens, head_dim, device=device)
    out = softcap_attention(q, q, q, softcap=CAP, backend=backend)
    expected = softcap_attention(q[-1:], q[-1:], q[-1:], softcap=CAP, backend=backend)
    assert torch.equal(out[-1:], expected)
    assert (out[:-1] == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_may_be_zero_or_negative(scale, backend, device):
    *inputs, grad = make_inputs(1, 2, 20, 16, torch.float32, CAP, device)
    op = functools.partial(softcap_attention, softcap=CAP, scale=scale)
    found, expected = (gradients(functools.partial(op, backend=b), inputs, grad) for b in (backend, "reference"))
    for name, a, b in zip(NAMES, found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("softcap", [CAP, 200.0, None])
def test_a_nan_in_one_query_is_seen_in_its_row_and_in_no_other(softcap, backend, device):
    q, k, v, grad = make_inputs(1, 1, 20, 16, torch.bfloat16, CAP, device)
    q[0, 0, 3, 0] = torch.nan
    out, q_grad, k_grad, v_grad = gradients(
        lambda *t: softcap_attention(*t, softcap=softcap, backend=backend), (q, k, v), grad
    )
    for rows in (out, q_grad):
        assert rows[:, :, 3].isnan().all() and rows[:, :, :3].isfinite().all() and rows[:, :, 4:].isfinite().all()
    assert k_grad.isnan().any() and v_grad.isnan().any()


def test_a_large_cap_is_plain_attention(backend, device):
    q, k, v, _ = make_inputs(2, 2, 40, 32, torch.float32, 1.0, device)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(softcap_attention(q, k, v, softcap=1e4, backend=backend), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(softcap_attention(q, k, v, softcap=None, backend=backend), expected)


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_no_cap_is_pytorchs_attention(biased, masked, device):
    q, k, v, grad = make_inputs(2, 2, 40, 32, torch.float32, CAP, device)
    bias = make_bias(1, 2, 40, 40, device=device) if biased else None
    key_mask = make_key_mask(2, 40, device) if masked else None

    def op(name):
        return lambda q, k, v, b: softcap_attention(
            q, k, v, softcap=None, scale=0.2, bias=b, key_mask=key_mask, backend=name
        )

    found, expected = (gradients(op(name), (q, k, v, bias), grad) for name in ("auto", "reference"))
    for name, a, b in zip(NAMES, found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [(), (6,), (2, 1, 6), (1, 1, 6, 1)], ids=str)
@pytest.mark.parametrize("softcap", [CAP, None])
@torch.no_grad()
def test_a_bias_of_any_rank_is_taken_with_a_cap_and_without(softcap, shape, device):
    q, k, v, _ = make_inputs(2, 2, 6, 8, torch.float32, CAP, device)
    bias = make_bias(*shape, device=device)
    expected = softcap_attention(q, k, v, softcap=softcap, bias=bias, backend="reference")
    for backend in ("tiled", "auto"):
        found = softcap_attention(q, k, v, softcap=softcap, bias=bias, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "tokens", "keys"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)])
def test_no_images_and_no_tokens_are_no_error(batch, tokens, keys, backend, device):
    q, grad = torch.randn(2, batch, 2, tokens, 16, device=device)
    k, v = torch.randn(2, batch, 2, keys, 16, device=device)
    found = gradients(lambda *t: softcap_attention(*t, softcap=CAP, backend=backend), (q, k, v), grad)
    assert [t.shape for t in found] == [q.shape, q.shape, k.shape, v.shape]
    assert all((t == 0).all() for t in found)


def test_autocast_casts_as_pytorchs_own_attention_does(backend, device):
    q, k, v, _ = make_inputs(1, 2, 20, 16, torch.float32, CAP, device)
    expected = softcap_attention(*(t.bfloat16() for t in (q, k, v)), softcap=CAP, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        for name in ("reference", backend):
            # Mixed dtypes are what rotary embeddings in fp32 leave behind under autocast.
            out = softcap_attention(q, k, v.bfloat16(), softcap=CAP, backend=name)
            assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
            torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7)


def test_reference_has_right_first_and_second_derivatives():
    q, k, v, _ = (t.requires_grad_() for t in make_inputs(2, 1, 3, 2, torch.float64, CAP, "cpu"))
    bias = make_bias(1, 1, 3, 3, dtype=torch.float64).requires_grad_()
    key_mask = torch.tensor([[True, False, True], [False, False, False]])

    def op(q, k, v, bias):
        return softcap_attention(q, k, v, softcap=CAP, bias=bias, key_mask=key_mask, backend="reference")

    assert torch.autograd.gradcheck(op, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(op, (q, k, v, bias))


def test_tiled_backward_passes_gradcheck(blocks):
    q, k, v, _ = (t.requires_grad_() for t in make_inputs(2, 1, 18, 2, torch.float64, CAP, "cpu"))
    bias = make_bias(1, 1, 1, 18, dtype=torch.float64).requires_grad_()

    def op(q, k, v, bias):
        return softcap_attention(q, k, v, softcap=CAP, bias=bias, key_mask=make_key_mask(2, 18), backend="tiled")

    assert torch.autograd.gradcheck(op, (q, k, v, bias), fast_mode=True)


def test_a_second_derivative_is_refused_but_by_the_reference(backend, device):
    q, k, v, _ = (t.requires_grad_() for t in make_inputs(1, 1, 4, 16, torch.float32, CAP, device))
    out = softcap_attention(q, k, v, softcap=CAP, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend='reference'"):
        grad.sum().backward()


def test_tiled_never_holds_more_scores_than_a_block(monkeypatch):
    """Largest tensor that forward and backward make: the scores of one block, far below T x T."""
    tokens, most = 256, 16 * 256
    monkeypatch.setattr(tiled, "MAX_BLOCK_SCORES", most)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(result):
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return result

    q, k, v, grad = (t.clone() for t in make_inputs(1, 1, tokens, 8, torch.float32, CAP, "cpu"))
    with Watch():
        tiled.softcap_attention(q, k, v, CAP, 1.0)
        tiled.softcap_attention_backward(grad, q, k, v, CAP, 1.0)
    assert largest == most


def test_what_is_saved_for_the_backward_grows_with_the_tokens_alone(backend, device):
    sizes = {}
    for tokens in (64, 128):
        saved = 0

        def pack(t, tokens=tokens):
            nonlocal saved
            saved += t.numel()
            return t

        q, k, v, _ = (t.requires_grad_() for t in make_inputs(1, 1, tokens, 16, torch.float32, CAP, device))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            softcap_attention(q, k, v, softcap=CAP, backend=backend)
        sizes[tokens] = saved
    assert sizes[128] == 2 * sizes[64] > 0


def test_two_runs_give_the_same_bits(backend, device):
    *inputs, grad = make_inputs(2, 2, 65, 32, torch.float32, CAP, device)
    first, second = (
        gradients(lambda *t: softcap_attention(*t, softcap=CAP, backend=backend), inputs, grad) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_projection_behind_takes_the_output_without_a_copy(backend, device):
    q, k, v, _ = make_inputs(2, 3, 10, 16, torch.float32, CAP, device)
    out = softcap_attention(q, k, v, softcap=CAP, backend=backend)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
def test_what_was_saved_may_come_back_in_another_layout(masked, backend, device):
    """As torch.autograd.graph.save_on_cpu(pin_memory=True) gives it back: contiguous, whatever it was."""
    *inputs, grad = make_inputs(2, 3, 20, 16, torch.float32, CAP, device)
    key_mask = make_key_mask(2, 20, device) if masked else None

    def op(*t):
        return softcap_attention(*t, softcap=CAP, key_mask=key_mask, backend=backend)

    expected = gradients(op, inputs, grad)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        found = gradients(op, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_gradient_that_is_one_number_for_all_is_right(backend, device):
    """As of out.sum(): expanded, all strides 0."""
    *inputs, grad = make_inputs(2, 2, 20, 16, torch.float32, CAP, device)
    one = torch.ones((), device=device).expand(grad.shape)
    check(inputs, one, CAP, backend)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_only_the_inputs_that_ask_get_a_gradient(wanted, backend, device):
    *inputs, grad = make_inputs(1, 2, 20, 16, torch.float32, CAP, device)
    expected = gradients(lambda *t: softcap_attention(*t, softcap=CAP, backend=backend), inputs, grad)[1:]
    for i in wanted:
        inputs[i].requires_grad_()
    softcap_attention(*inputs, softcap=CAP, backend=backend).backward(grad)
    for i, (t, e) in enumerate(zip(inputs, expected, strict=True)):
        assert torch.equal(t.grad, e) if i in wanted else t.grad is None


def test_the_backward_runs_nothing_for_the_log_sum_exp(backend, device):
    """It has no gradient, so none is filled with zeros."""
    *inputs, grad = make_inputs(1, 2, 20, 16, torch.float32, CAP, device)
    q, k, v = (t.requires_grad_() for t in inputs)
    out = softcap_attention(q, k, v, softcap=CAP, backend=backend)
    with Names() as names:
        torch.autograd.grad(out, (q, k, v), grad)
    assert [name for name in names.seen if name != "aten::detach"] == ["locfast::softcap_attention_backward"]


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_flops_are_counted(backend, device):
    q, k, v, _ = (t.requires_grad_() for t in make_inputs(2, 3, 10, 16, torch.float32, CAP, device, keys=7))
    product = 2 * 2 * 3 * 10 * 7 * 16
    with FlopCounterMode(display=False) as counter:
        out = softcap_attention(q, k, v, softcap=CAP, backend=backend)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_ops_pass_opcheck(with_bias, with_mask, backend, device):
    if with_bias and backend != "tiled":
        pytest.skip("fused backends take no bias")
    q, k, v, grad = make_inputs(2, 2, 6, 16, torch.float32, CAP, device)
    bias = make_bias(1, 2, 6, 6, device=device) if with_bias else None
    key_mask = make_key_mask(2, 6, device) if with_mask else None
    forward = torch.ops.locfast.softcap_attention.default
    out, lse = forward(q, k, v, CAP, 0.3, key_mask, bias, backend)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(forward, (*inputs, CAP, 0.3, key_mask, bias, backend))
    arguments = (grad, q, k, v, out, lse, CAP, 0.3, key_mask, bias, with_bias, backend)
    torch.library.opcheck(torch.ops.locfast.softcap_attention_backward.default, arguments)


def test_compiled_model_takes_the_op_without_a_graph_break(backend, device):
    *inputs, grad = make_inputs(1, 2, 20, 16, torch.float32, CAP, device)

    def op(*t):
        return softcap_attention(*t, softcap=CAP, backend=backend)

    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, inputs, grad), gradients(op, inputs, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_bias_is_refused_by_name_and_sends_auto_to_plain_pytorch(backend, device):
    q, k, v, _ = make_inputs(1, 1, 4, 16, torch.float32, CAP, device)
    bias = make_bias(4, 4, device=device)
    with pytest.raises(_backend.BackendError, match=f"{backend}.*it takes no bias.*Use tiled or reference"):
        softcap_attention(q, k, v, softcap=CAP, bias=bias, backend=backend)
    expected = softcap_attention(q, k, v, softcap=CAP, bias=bias, backend="tiled")
    assert torch.equal(softcap_attention(q, k, v, softcap=CAP, bias=bias), expected)


def test_auto_says_why_a_bias_runs_on_a_slower_backend():
    choice = _backend._choice("softcap_attention", torch.device("cuda"), torch.bfloat16, "auto", "it takes no bias")
    assert choice.backend == "tiled"
    assert "triton: it takes no bias" in choice.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(1, 2, 4, 8)), r"share B, H and D.*\[1, 2, 3, 8\].*\[1, 2, 4, 8\]"),
        (dict(k=torch.zeros(1, 2, 3, 6), v=torch.zeros(1, 2, 3, 6)), r"share B, H and D.*\[1, 2, 3, 6\]"),
        (dict(q=torch.zeros(2, 3, 8)), r"\[B, H, Tq, D\].*\[2, 3, 8\]"),
        (dict(zip("qkv", torch.zeros(3, 1, 2, 3, 0), strict=True)), r"width 0.*\[1, 2, 3, 0\]"),
        (dict(v=torch.zeros(1, 2, 3, 8).bfloat16()), "one floating dtype.*float32.*bfloat16"),
        (dict(q=torch.zeros(1, 2, 3, 8).int()), "one floating dtype.*int32"),
        (dict(softcap=0.0), "positive and finite, or None.*got 0"),
        (dict(softcap=-1.0), "positive and finite, or None.*got -1"),
        (dict(softcap=float("nan")), "positive and finite, or None.*got nan"),
        (dict(softcap=float("inf")), "positive and finite, or None.*got inf"),
        (dict(bias=torch.zeros(2, 4, 4)), r"\[1, 2, 3, 3\].*\[2, 4, 4\]"),
        (dict(bias=torch.zeros(3, 3, dtype=torch.bool)), "floating.*bool"),
        (dict(key_mask=torch.ones(1, 4, dtype=torch.bool)), r"\[B, Tk\] = \[1, 3\].*\[1, 4\]"),
        (dict(key_mask=torch.ones(1, 3)), "must be bool.*float32"),
        (dict(key_mask=torch.ones(1, 3, dtype=torch.bool, device="meta")), "one device.*cpu.*meta"),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_wanted_and_found(change, message):
    inputs = dict(q=torch.zeros(1, 2, 3, 8), k=torch.zeros(1, 2, 3, 8), v=torch.zeros(1, 2, 3, 8), softcap=CAP)
    with pytest.raises(ValueError, match=message):
        softcap_attention(**(inputs | change))


def test_a_meta_device_tells_the_shape():
    q = torch.empty(2, 3, 5, 16, device="meta")
    assert softcap_attention(q, q, q, softcap=CAP).shape == q.shape


def test_too_wide_heads_are_refused_but_by_the_reference():
    q = torch.randn(1, 1, 2, 300)
    with pytest.raises(ValueError, match=r"head dim 300 is beyond 256.*backend='reference'.*\[1, 1, 2, 300\]"):
        softcap_attention(q, q, q, softcap=CAP)
    assert softcap_attention(q, q, q, softcap=CAP, backend="reference").shape == q.shape


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q = torch.zeros(1, 1, 2, 16)
    with pytest.raises(
        _backend.BackendError, match=r"needs a CUDA device, tensors are on cpu.*Use .*tiled.*\[1, 1, 2, 16\]"
    ):
        softcap_attention(q, q, q, softcap=CAP, backend="triton")
