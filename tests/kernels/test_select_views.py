import pytest
import torch
from torch import Tensor

from locfast.kernels import _backend
from locfast.kernels.select_views import select_views

from .tolerance import assert_close_as_dtype_allows, assert_no_lost_gradient

FUSED = ("triton", "cuda")
SHAPES = {  # B, V, N, P, C
    "odd width": (2, 3, 7, 1, 33),
    "packed width": (3, 2, 16, 0, 24),
    "registers": (1, 1, 9, 5, 40),
    "several tiles": (2, 3, 20, 1, 264),
    "many images": (19, 3, 4, 1, 16),
}


def usable(backend: str, device: torch.device) -> str:
    try:
        return _backend.choose("select_views", device, torch.float32, backend)
    except _backend.BackendError as error:
        pytest.skip(str(error))


def make_inputs(shape, dtype, device, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, views, patches, prefix, width = shape
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randn(batch, patches, width, generator=generator).to(dtype)
    hidden = torch.randn(prefix + patches, width, generator=generator).to(dtype)
    visible = torch.rand(batch, views, patches, generator=generator) < 0.5
    grad = torch.randn(batch, views, prefix + patches, width, generator=generator).to(dtype)
    return shown.to(device), hidden.to(device), visible.to(device), grad.to(device)


def run(shown: Tensor, hidden: Tensor, visible: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    shown, hidden = shown.detach().requires_grad_(), hidden.detach().requires_grad_()
    out = select_views(shown, hidden, visible, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, (shown, hidden), grad))


def test_reference_picks_row_by_row():
    shown, hidden, visible, _ = make_inputs((2, 3, 5, 2, 4), torch.float64, "cpu")
    out = select_views(shown, hidden, visible, backend="reference")
    for b in range(2):
        for v in range(3):
            for t in range(7):
                is_shown = t >= 2 and visible[b, v, t - 2]
                assert torch.equal(out[b, v, t], shown[b, t - 2] if is_shown else hidden[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("backend", FUSED)
def test_fused_backends_pick_the_very_bits_and_sum_gradients_as_dtype_allows(backend, shape, dtype, device):
    usable(backend, device)
    inputs = make_inputs(shape, dtype, device)
    found, same = run(*inputs, backend), run(*inputs, "reference")
    shown, hidden, visible, grad = inputs
    truth = run(shown.double(), hidden.double(), visible, grad.double(), "reference")
    assert torch.equal(found[0], same[0])
    for name, a, b, c in zip(("shown.grad", "hidden.grad"), found[1:], same[1:], truth[1:], strict=True):
        assert_close_as_dtype_allows(a, b, c, name)
        assert_no_lost_gradient(a, c, name)


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_nan_stays_where_it_is_not_picked(backend, device):
    usable(backend, device)
    shown, hidden, visible, grad = make_inputs(SHAPES["several tiles"], torch.float32, device)
    visible[:, :, 3], visible[0, :, 5] = True, False
    grad[0, 0, 1 + 3] = float("nan")  # of a shown place: the hidden row's gradient does not see it
    clean = run(shown, hidden, visible, grad, backend)
    shown[0, 5], hidden[1 + 3] = float("nan"), float("nan")
    found = run(shown, hidden, visible, grad, backend)
    assert torch.equal(found[0], clean[0]) and found[0].isfinite().all()
    assert found[1][1].isfinite().all() and found[2].isfinite().all()
    assert found[1][0, 3].isnan().all()


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_strided_inputs_give_what_contiguous_ones_give(backend, device):
    if backend == "reference":  # on a GPU PyTorch's own sums take another order for other strides
        device = torch.device("cpu")
    usable(backend, device)
    shown, hidden, visible, grad = make_inputs((2, 3, 8, 1, 16), torch.float32, device)
    strided = (
        shown.transpose(1, 2).contiguous().transpose(1, 2),
        hidden.t().contiguous().t(),
        visible.transpose(1, 2).contiguous().transpose(1, 2),
        grad[:1, :1].expand_as(grad),
    )
    assert not any(t.is_contiguous() for t in strided)
    expected = run(shown, hidden, visible, grad[:1, :1].expand_as(grad).contiguous(), backend)
    for a, b in zip(run(*strided, backend), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_an_empty_batch_is_no_error(backend, device):
    usable(backend, device)
    out, shown_grad, hidden_grad = run(*make_inputs((0, 2, 4, 1, 8), torch.float32, device), backend)
    assert out.shape == (0, 2, 5, 8)
    assert shown_grad.shape == (0, 4, 8)
    assert torch.equal(hidden_grad, torch.zeros_like(hidden_grad))


@pytest.mark.parametrize("backend", FUSED)
def test_backward_gives_the_same_bits_every_time(backend, device):
    usable(backend, device)
    inputs = make_inputs((5, 3, 12, 1, 48), torch.float32, device)
    first, second = run(*inputs, backend), run(*inputs, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_ops_pass_opcheck(backend, device):
    usable(backend, device)
    shown, hidden, visible, grad = make_inputs((2, 2, 4, 1, 8), torch.float32, device)
    inputs = (shown.requires_grad_(), hidden.requires_grad_(), visible, backend)
    torch.library.opcheck(torch.ops.locfast.select_views.default, inputs)
    torch.library.opcheck(torch.ops.locfast.select_views_backward.default, (grad, visible, backend))


def test_reference_has_right_first_and_second_derivatives():
    shown, hidden, visible, _ = make_inputs((2, 2, 3, 1, 4), torch.float64, "cpu")

    def op(shown, hidden):
        return select_views(shown, hidden, visible, backend="reference").square()

    inputs = (shown.requires_grad_(), hidden.requires_grad_())
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


def test_compiled_model_takes_the_op_without_a_graph_break(device):
    usable("cuda", device)
    shown, hidden, visible, _ = make_inputs((2, 2, 4, 1, 8), torch.float32, device)
    compiled = torch.compile(lambda *args: select_views(*args, backend="cuda") * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(shown, hidden, visible), 2 * select_views(shown, hidden, visible, backend="reference"))


@pytest.mark.parametrize(
    ("change", "wanted", "found"),
    [
        (dict(shown=torch.zeros(2, 8)), r"\[B, N, C\]", r"\[2, 8\]"),
        (dict(shown=torch.zeros(2, 4, 8, dtype=torch.int64)), "floating", "int64"),
        (dict(visible=torch.zeros(2, 3, 5, dtype=torch.bool)), r"\[2, V, 4\]", r"\[2, 3, 5\]"),
        (dict(visible=torch.zeros(2, 3, 4)), "bool", "float32"),
        (dict(hidden=torch.zeros(3, 8)), r"\[4 or more, 8\]", r"\[3, 8\]"),
        (dict(hidden=torch.zeros(5, 8).half()), "float32", "float16"),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_wanted_and_found(change, wanted, found):
    inputs = dict(shown=torch.zeros(2, 4, 8), hidden=torch.zeros(5, 8), visible=torch.zeros(2, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"{wanted}.*{found}"):
        select_views(**(inputs | change))
