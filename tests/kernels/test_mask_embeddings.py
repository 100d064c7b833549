import pytest
import torch
from torch import Tensor

from locfast.kernels import _backend
from locfast.kernels.mask_embeddings import mask_embeddings

from .tolerance import assert_close_as_dtype_allows, assert_no_lost_gradient

FUSED = ("triton", "cuda")
SHAPES = {  # B, V, N, P, C
    "odd width": (2, 3, 7, 1, 33),
    "packed width": (3, 2, 16, 0, 24),
    "registers": (1, 1, 9, 5, 40),
    "several tiles": (10, 3, 4, 1, 264),  # of channels, and of images
}


def usable(backend: str, device: torch.device) -> str:
    try:
        return _backend.choose("mask_embeddings", device, torch.float32, backend)
    except _backend.BackendError as error:
        pytest.skip(str(error))


def make_inputs(shape, dtype, device, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, views, patches, prefix, width = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, patches, width, generator=generator).to(dtype)
    visible = torch.rand(batch, views, patches, generator=generator) < 0.5
    position = torch.randn(prefix + patches, width, generator=generator)
    grad = torch.randn(batch, views, prefix + patches, width, generator=generator).to(dtype)
    return x.to(device), visible.to(device), position.to(device), grad.to(device)


def run(x: Tensor, visible: Tensor, position: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    x, position = x.detach().requires_grad_(), position.detach().requires_grad_()
    out = mask_embeddings(x, visible, position, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, (x, position), grad))


def test_reference_is_the_equation_written_as_a_loop():
    x, visible, position, _ = make_inputs((2, 3, 5, 2, 4), torch.float64, "cpu")
    out = mask_embeddings(x, visible, position.double(), backend="reference")
    for b in range(2):
        for v in range(3):
            for t in range(7):
                patch = x[b, t - 2] if t >= 2 and visible[b, v, t - 2] else torch.zeros(4, dtype=torch.float64)
                assert torch.equal(out[b, v, t], patch + position[t].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("backend", FUSED)
def test_fused_backends_equal_the_reference(backend, shape, dtype, device):
    usable(backend, device)
    inputs = make_inputs(shape, dtype, device)
    found = run(*inputs, backend)
    same = run(*inputs, "reference")
    x, visible, position, grad = inputs
    truth = run(x.double(), visible, position.double(), grad.double(), "reference")
    for name, a, b, c in zip(("output", "x.grad", "position.grad"), found, same, truth, strict=True):
        assert_close_as_dtype_allows(a, b, c, name)
        assert_no_lost_gradient(a, c, name)


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_nan_in_a_hidden_patch_reaches_nothing(backend, device):
    usable(backend, device)
    x, visible, position, grad = make_inputs(SHAPES["several tiles"], torch.float32, device)
    visible[0, :, 3] = False  # hidden in every view
    clean = run(x, visible, position, grad, backend)
    x[0, 3] = float("nan")
    for a, b in zip(clean, run(x, visible, position, grad, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_nan_in_the_gradient_of_a_hidden_place_does_not_reach_x(backend, device):
    usable(backend, device)
    x, visible, position, grad = make_inputs((2, 2, 6, 1, 16), torch.float32, device)
    visible[0, 0, 2], visible[0, 1, 2] = False, True
    grad[0, 0, 3] = float("nan")
    assert run(x, visible, position, grad, backend)[1].isfinite().all()


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_strided_inputs_give_what_contiguous_ones_give(backend, device):
    if backend == "reference":  # on a GPU PyTorch's own sums take another order for other strides
        device = torch.device("cpu")
    usable(backend, device)
    x, visible, position, grad = make_inputs((2, 3, 8, 1, 16), torch.float32, device)
    strided = (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        visible.transpose(1, 2).contiguous().transpose(1, 2),
        position.t().contiguous().t(),
        grad[:1, :1].expand_as(grad),
    )
    assert not any(t.is_contiguous() for t in strided)
    expected = run(x, visible, position, grad[:1, :1].expand_as(grad).contiguous(), backend)
    for a, b in zip(run(*strided, backend), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", FUSED)
def test_backward_gives_the_same_bits_every_time(backend, device):
    usable(backend, device)
    inputs = make_inputs((5, 3, 12, 1, 48), torch.float32, device)
    first, second = run(*inputs, backend), run(*inputs, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_an_empty_batch_is_no_error(backend, device):
    usable(backend, device)
    out, x_grad, position_grad = run(*make_inputs((0, 2, 4, 1, 8), torch.float32, device), backend)
    assert out.shape == (0, 2, 5, 8)
    assert x_grad.shape == (0, 4, 8)
    assert torch.equal(position_grad, torch.zeros_like(position_grad))


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_position_in_another_dtype_keeps_its_dtype_in_the_gradient(backend, device):
    usable(backend, device)
    x, visible, position, grad = make_inputs((2, 2, 4, 1, 8), torch.bfloat16, device)
    out, x_grad, position_grad = run(x, visible, position, grad, backend)
    assert (out.dtype, x_grad.dtype, position_grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert run(x, visible, position.bfloat16(), grad, backend)[2].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_ops_pass_opcheck(backend, device):
    usable(backend, device)
    x, visible, position, grad = make_inputs((2, 2, 4, 1, 8), torch.float32, device)
    x.requires_grad_()
    position.requires_grad_()
    torch.library.opcheck(torch.ops.locfast.mask_embeddings.default, (x, visible, position, backend))
    backward = torch.ops.locfast.mask_embeddings_backward.default
    torch.library.opcheck(backward, (grad, visible, 1, torch.float32, backend))


def test_reference_has_right_first_and_second_derivatives():
    x, visible, position, _ = make_inputs((2, 2, 3, 1, 4), torch.float64, "cpu")
    x, position = x.requires_grad_(), position.double().requires_grad_()

    def op(x, position):
        return mask_embeddings(x, visible, position, backend="reference").square()

    assert torch.autograd.gradcheck(op, (x, position))
    assert torch.autograd.gradgradcheck(op, (x, position))


def test_compiled_model_takes_the_op_without_a_graph_break(device):
    usable("cuda", device)
    x, visible, position, _ = make_inputs((2, 2, 4, 1, 8), torch.float32, device)
    compiled = torch.compile(
        lambda *args: mask_embeddings(*args, backend="cuda") * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x, visible, position), 2 * mask_embeddings(x, visible, position, backend="reference"))


@pytest.mark.parametrize(
    ("change", "wanted", "found"),
    [
        (dict(x=torch.zeros(2, 8)), r"\[B, N, C\]", r"\[2, 8\]"),
        (dict(visible=torch.zeros(2, 3, 5, dtype=torch.bool)), r"\[2, V, 4\]", r"\[2, 3, 5\]"),
        (dict(visible=torch.zeros(2, 3, 4)), "bool", "float32"),
        (dict(position=torch.zeros(3, 8)), r"\[4 or more, 8\]", r"\[3, 8\]"),
        (dict(position=torch.zeros(5, 9)), r"\[4 or more, 8\]", r"\[5, 9\]"),
        (dict(x=torch.zeros(2, 4, 8, dtype=torch.int64)), "floating", "int64"),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_wanted_and_found(change, wanted, found):
    inputs = dict(x=torch.zeros(2, 4, 8), visible=torch.zeros(2, 3, 4, dtype=torch.bool), position=torch.zeros(5, 8))
    with pytest.raises(ValueError, match=f"{wanted}.*{found}"):
        mask_embeddings(**(inputs | change))


def test_poison_reaches_memory_that_nobody_writes():
    assert torch.empty(4).isnan().all()
