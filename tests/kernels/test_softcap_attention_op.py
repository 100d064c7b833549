"""Soft-capped attention's manners: autograd, memory, layouts, torch.compile, FLOPs, and what it refuses."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from locfast.kernels import _backend
from locfast.kernels.softcap_attention import softcap_attention, tiled

from .attention_checks import CAP, check, gradients, make_bias, make_inputs, make_key_mask


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_pass_opcheck(dtype, with_bias, with_mask, backend, device):
    if with_bias and backend != "tiled":
        pytest.skip("fused backends take no bias")
    keeps_rest = backend == "triton" and dtype == torch.bfloat16
    q, k, v, grad = make_inputs(2, 2, 6, 16, dtype, CAP, device)
    bias = make_bias(1, 2, 6, 6, device=device) if with_bias else None
    key_mask = make_key_mask(2, 6, device) if with_mask else None
    forward = torch.ops.locfast.softcap_attention.default
    saved = forward(q, k, v, CAP, 0.3, key_mask, bias, keeps_rest, backend)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(forward, (*inputs, CAP, 0.3, key_mask, bias, keeps_rest, backend))
    arguments = (grad, q, k, v, *saved, CAP, 0.3, key_mask, bias, with_bias, backend)
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
        (dict(softcap=1e39), "positive and finite, or None.*got 1e\\+39"),
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
