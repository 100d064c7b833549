import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from locfast.kernels import _backend
from locfast.kernels.softcap_attention import softcap_attention, tiled

from .tolerance import assert_close_as_dtype_allows, assert_no_lost_gradient

CAP = 5.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 72, 80, 96, 128)
TOKENS = (1, 50, 196, 197, 257, 577, 729)
CAPS = (CAP, 30.0, 100.0)
NAMES = ("output", "q.grad", "k.grad", "v.grad", "bias.grad")


class Rounded(torch.autograd.Function):
    """Rounds to a dtype and goes on in fp32, forward and backward: what a tensor core does to its operands."""

    @staticmethod
    def forward(ctx, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def rounding_only_what_must_be(q, k, v, softcap, scale, bias):
    """The reference in fp32, with the probabilities and the output rounded to the inputs' dtype."""
    logits = q.float() @ k.float().transpose(-2, -1) * scale
    logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.float()
    return (Rounded.apply(torch.softmax(logits, -1), q.dtype) @ v.float()).to(q.dtype)


def make_inputs(batch, heads, tokens, head_dim, dtype, cap, device, seed=0) -> list[Tensor]:
    """q, k, v and the output's gradient; logits (scale D^-0.5) spread to twice the cap: both sides of its knee."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = torch.randn(4, batch, heads, tokens, head_dim, generator=generator)
    return [t.to(dtype).to(device) for t in (q * cap**0.5, k * cap**0.5, v, grad)]


def make_bias(*shape: int, device="cpu", dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


def gradients(function, inputs, grad):
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [t for t in inputs if t is not None], grad)]


def check(inputs, grad, softcap, backend="tiled", bias=None, scale=None):
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    found = gradients(lambda q, k, v, b: softcap_attention(q, k, v, softcap, scale, b, backend), [*inputs, bias], grad)
    same = gradients(lambda q, k, v, b: rounding_only_what_must_be(q, k, v, softcap, scale, b), [*inputs, bias], grad)
    wide = [None if t is None else t.double() for t in (*inputs, bias)]
    truth = gradients(
        lambda q, k, v, b: softcap_attention(q, k, v, softcap, scale, b, "reference"), wide, grad.double()
    )
    for name, a, b, c in zip(NAMES, found, same, truth, strict=False):
        assert_close_as_dtype_allows(a, b, c, name)
        assert_no_lost_gradient(a, c, name)


@pytest.fixture(params=["one block", "several blocks"])
def blocks(request, monkeypatch):
    if request.param == "several blocks":
        monkeypatch.setattr(tiled, "MAX_BLOCK_SCORES", 1)  # then blocks have 16 rows, the least


def test_reference_is_the_equation_written_as_a_loop():
    q, k, v, _ = make_inputs(1, 2, 5, 4, torch.float64, CAP, "cpu")
    bias = make_bias(2, 5, 5, dtype=torch.float64)
    out = softcap_attention(q, k, v, CAP, 0.3, bias, "reference")
    for h in range(2):
        for i in range(5):
            logits = torch.stack(
                [CAP * torch.tanh(q[0, h, i] @ k[0, h, j] * 0.3 / CAP) + bias[h, i, j] for j in range(5)]
            )
            weights = logits.exp() / logits.exp().sum()
            torch.testing.assert_close(out[0, h, i], weights @ v[0, h], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_in_every_dtype(head_dim, dtype, device):
    *inputs, grad = make_inputs(2, 2, 50, head_dim, dtype, CAP, device)
    check(inputs, grad, CAP)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_length_under_every_cap(tokens, softcap, device):
    *inputs, grad = make_inputs(1, 2, tokens, 64, torch.float32, softcap, device)
    check(inputs, grad, softcap)


@pytest.mark.parametrize("tokens", [1, 33, 65])
def test_blocks_of_rows_change_nothing(tokens, blocks, device):
    *inputs, grad = make_inputs(2, 2, tokens, 32, torch.bfloat16, CAP, device)
    check(inputs, grad, CAP, bias=make_bias(1, 2, tokens, tokens, device=device))


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
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
@pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES.keys())
def test_every_stride_with_every_bias(stride, bias, device, monkeypatch):
    monkeypatch.setattr(tiled, "MAX_BLOCK_SCORES", 1)
    *inputs, grad = make_inputs(2, 2, 50, 64, torch.float32, CAP, device)
    values = None if bias is None else make_bias(*bias, device=device)
    check([stride(t) for t in inputs], stride(grad), CAP, bias=values)


def test_minus_infinity_in_the_bias_hides_a_token(blocks, device):
    q, k, v, grad = make_inputs(1, 2, 20, 16, torch.float32, CAP, device)
    bias = torch.zeros(1, 1, 1, 20, device=device)
    bias[..., 7:] = -torch.inf
    out, *grads = gradients(
        lambda q, k, v: softcap_attention(q, k, v, CAP, bias=bias, backend="tiled"), (q, k, v), grad
    )
    expected = softcap_attention(q, k, v, CAP, bias=bias, backend="reference")
    torch.testing.assert_close(out, expected)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][:, :, 7:] == 0).all()
    assert (grads[2][:, :, 7:] == 0).all()


def test_saturated_rows_stay_finite(device):
    """All logits far beyond the cap, values of size 100: the softmax of a constant row is their mean."""
    q = torch.full((1, 1, 64, 16), 100.0, device=device)
    v = 100 * torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0)).to(device)
    out = softcap_attention(q, q, v, 30.0)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v), rtol=1e-5, atol=1e-4)


def test_a_large_cap_is_plain_attention(device):
    q, k, v, _ = make_inputs(2, 2, 40, 32, torch.float64, 1.0, device)
    torch.testing.assert_close(softcap_attention(q, k, v, 1e6), F.scaled_dot_product_attention(q, k, v))


def test_no_cap_is_plain_attention_with_the_bias_as_its_mask(device):
    q, k, v, grad = make_inputs(2, 2, 40, 32, torch.float32, CAP, device)
    bias = make_bias(1, 2, 40, 40, device=device)
    found = gradients(lambda q, k, v, b: softcap_attention(q, k, v, None, 0.2, b), (q, k, v, bias), grad)
    expected = gradients(
        lambda q, k, v, b: softcap_attention(q, k, v, None, 0.2, b, "reference"), (q, k, v, bias), grad
    )
    for name, a, b in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [(), (6,), (2, 1, 6), (1, 1, 6, 1)], ids=str)
@pytest.mark.parametrize("softcap", [CAP, None])
@torch.no_grad()
def test_a_bias_of_any_rank_is_taken_with_a_cap_and_without(softcap, shape, device):
    q, k, v, _ = make_inputs(2, 2, 6, 8, torch.float32, CAP, device)
    bias = make_bias(*shape, device=device)
    expected = softcap_attention(q, k, v, softcap, bias=bias, backend="reference")
    torch.testing.assert_close(softcap_attention(q, k, v, softcap, bias=bias, backend="tiled"), expected)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_no_images_and_no_tokens_are_no_error(batch, tokens, device):
    *inputs, grad = make_inputs(batch, 2, tokens, 8, torch.float32, CAP, device)
    found = gradients(lambda *t: softcap_attention(*t, CAP, backend="tiled"), inputs, grad)
    assert all(t.shape == (batch, 2, tokens, 8) for t in found)


def test_autocast_casts_as_pytorchs_own_attention_does(device):
    q, k, v, _ = make_inputs(1, 2, 20, 16, torch.float32, CAP, device)
    expected = softcap_attention(*(t.bfloat16() for t in (q, k, v)), CAP)
    with torch.autocast(device.type, torch.bfloat16):
        for backend in ("reference", "tiled"):
            # Mixed dtypes are what rotary embeddings in fp32 leave behind under autocast.
            out = softcap_attention(q, k, v.bfloat16(), CAP, backend=backend)
            assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
            torch.testing.assert_close(out, expected, rtol=2**-8, atol=2**-8)


def test_reference_has_right_first_and_second_derivatives():
    q, k, v, _ = (t.requires_grad_() for t in make_inputs(1, 2, 3, 2, torch.float64, CAP, "cpu"))
    bias = make_bias(1, 2, 3, 3, dtype=torch.float64).requires_grad_()

    def op(q, k, v, bias):
        return softcap_attention(q, k, v, CAP, bias=bias, backend="reference")

    assert torch.autograd.gradcheck(op, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(op, (q, k, v, bias))


def test_tiled_backward_passes_gradcheck(blocks):
    q, k, v, _ = (t.requires_grad_() for t in make_inputs(1, 1, 18, 2, torch.float64, CAP, "cpu"))
    bias = make_bias(1, 1, 1, 18, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: softcap_attention(q, k, v, CAP, bias=b, backend="tiled"), (q, k, v, bias), fast_mode=True
    )


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
        tiled.softcap_attention(q, k, v, CAP, 1.0, None)
        tiled.softcap_attention_backward(grad, q, k, v, CAP, 1.0, None, False)
    assert largest == most


def test_two_runs_give_the_same_bits(device):
    *inputs, grad = make_inputs(2, 4, 65, 32, torch.float32, CAP, device)
    first, second = (gradients(lambda *t: softcap_attention(*t, CAP), inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_flops_are_counted(device):
    q, k, v, _ = (t.requires_grad_() for t in make_inputs(2, 3, 10, 16, torch.float32, CAP, device))
    product = 2 * 2 * 3 * 10 * 10 * 16
    with FlopCounterMode(display=False) as counter:
        out = softcap_attention(q, k, v, CAP, backend="tiled")
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


@pytest.mark.parametrize("with_bias", [False, True])
def test_ops_pass_opcheck(with_bias, device):
    q, k, v, grad = make_inputs(1, 2, 6, 8, torch.float32, CAP, device)
    bias = make_bias(1, 2, 6, 6, device=device) if with_bias else None
    for t in (q, k, v):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.locfast.softcap_attention.default, (q, k, v, CAP, 0.3, bias))
    q, k, v = (t.detach() for t in (q, k, v))
    arguments = (grad, q, k, v, CAP, 0.3, bias, with_bias)
    torch.library.opcheck(torch.ops.locfast.softcap_attention_backward.default, arguments)


def test_compiled_model_takes_the_op_without_a_graph_break(device):
    *inputs, grad = make_inputs(1, 2, 20, 16, torch.float32, CAP, device)
    compiled = torch.compile(lambda *t: softcap_attention(*t, CAP), backend="aot_eager", fullgraph=True)
    for a, b in zip(
        gradients(compiled, inputs, grad),
        gradients(lambda *t: softcap_attention(*t, CAP), inputs, grad),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_kernel_that_is_not_there_cannot_be_asked_for(backend):
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(_backend.BackendError, match=f"{backend}.*no such kernel.*Use tiled or reference"):
        softcap_attention(q, q, q, CAP, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(1, 2, 4, 8)), r"one shape.*\[1, 2, 3, 8\].*\[1, 2, 4, 8\]"),
        (dict(q=torch.zeros(2, 3, 8)), r"\[B, H, T, D\].*\[2, 3, 8\]"),
        (dict(v=torch.zeros(1, 2, 3, 8).bfloat16()), "one floating dtype.*float32.*bfloat16"),
        (dict(softcap=0.0), "positive and finite, or None, got 0"),
        (dict(softcap=float("nan")), "positive and finite, or None, got nan"),
        (dict(softcap=float("inf")), "positive and finite, or None, got inf"),
        (dict(bias=torch.zeros(2, 4, 4)), r"\[1, 2, 3, 3\].*\[2, 4, 4\]"),
        (dict(bias=torch.zeros(3, 3, dtype=torch.bool)), "floating.*bool"),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_wanted_and_found(change, message):
    inputs = dict(q=torch.zeros(1, 2, 3, 8), k=torch.zeros(1, 2, 3, 8), v=torch.zeros(1, 2, 3, 8), softcap=CAP)
    with pytest.raises(ValueError, match=message):
        softcap_attention(**(inputs | change))
