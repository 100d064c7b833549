"""Soft-capped attention: every backend of this machine against the reference, in values and gradients."""

import functools

import pytest
import torch
from torch.nn import functional as F

from locfast.kernels._backend import interpreting
from locfast.kernels.softcap_attention import softcap_attention, tiled

from .attention_checks import CAP, DTYPES, NAMES, check, gradients, make_bias, make_inputs, make_key_mask

HEAD_DIMS = (64, 72, 80, 96, 128)
TOKENS = (1, 50, 196, 197, 257, 577, 729)
CAPS = (15.0, 30.0, 50.0, 80.0, 200.0, None)


@pytest.fixture
def large_tiles(monkeypatch):
    """In the interpreter a tile costs the same whatever its size: larger ones where the default's are not the point."""
    if interpreting():
        from locfast.kernels.softcap_attention import triton

        for kernel in ("forward", "backward_q", "backward_kv"):
            monkeypatch.setitem(triton.tiles_override, kernel, triton.Tiles(256, 256, 8, 2))


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


@pytest.mark.parametrize("softcap", [CAP, 200.0, None])
def test_a_nan_in_a_kept_key_is_seen_everywhere(softcap, backend, device):
    q, k, v, grad = make_inputs(1, 1, 20, 16, torch.bfloat16, CAP, device)
    k[0, 0, 3, 0] = torch.nan
    found = gradients(lambda *t: softcap_attention(*t, softcap=softcap, backend=backend), (q, k, v), grad)
    assert all(t.isnan().all() for t in found)


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


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "softcap"), [(50, 80.0), (50, 200.0), (197, 200.0)])
def test_gradients_of_peaked_rows_survive_the_rounding_of_the_output(
    tokens, softcap, dtype, masked, backend, device, large_tiles
):
    """Where one weight is nearly 1, gradients are small differences of large products: grad * out is too rough."""
    key_mask = make_key_mask(2, tokens, device) if masked else None
    for seed in (0, tokens):
        *inputs, grad = make_inputs(2, 1, tokens, 64, dtype, softcap, device, seed)
        check(inputs, grad, softcap, backend, key_mask=key_mask)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_whole_product_of_shapes_dtypes_caps_strides_and_masks(
    tokens, head_dim, dtype, backend, device, large_tiles
):
    for softcap in CAPS:
        *inputs, grad = make_inputs(2, 1, tokens, head_dim, dtype, softcap, device, seed=tokens)
        for stride in STRIDES.values():
            for key_mask in (None, make_key_mask(2, tokens, device)):
                check([stride(t) for t in inputs], stride(grad), softcap, backend, key_mask=key_mask)
