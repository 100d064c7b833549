import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locfast.kernels import _backend
from locfast.kernels.reconstruction_loss import LOSSES, reconstruction_loss, token_distance
from locfast.kernels.reconstruction_loss.layout import merged

from .tolerance import assert_close_as_dtype_allows, assert_no_lost_gradient

FUSED = ("triton", "cuda")
SHAPES = {  # B, V, T, C
    "odd width": (2, 3, 5, 33),
    "packed width": (1, 2, 5, 264),
    "one token": (3, 1, 1, 8),
}
DTYPES = {  # of prediction and target
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16 of fp32": (torch.bfloat16, torch.float32),
    "fp32 of fp16": (torch.float32, torch.float16),
}


def usable(backend: str, device: torch.device) -> str:
    try:
        return _backend.choose("reconstruction_loss", device, torch.float32, backend)
    except _backend.BackendError as error:
        pytest.skip(str(error))


def make_inputs(shape, dtypes, device, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, *shape, generator=generator).unbind(0)
    grad = torch.randn(shape[:3], generator=generator)
    scale = torch.tensor(
        0.75
    )  # whose products with bf16 and fp16 fp32 holds, or a difference of 0 would not be one in fp64
    return prediction.to(device, dtypes[0]), target.to(device, dtypes[1]), scale.to(device), grad.to(device)


def run(prediction: Tensor, target: Tensor, scale: Tensor, grad: Tensor, loss: str, backend: str) -> tuple:
    prediction = prediction.detach().requires_grad_()
    distance = token_distance(prediction, target, scale, loss=loss, backend=backend)
    return distance.detach(), *torch.autograd.grad(distance, prediction, grad)


def truth_of(prediction: Tensor, target: Tensor, scale: Tensor, grad: Tensor, loss: str) -> tuple:
    return run(prediction.double(), target.double(), scale.double(), grad.double(), loss, "reference")


def test_distances_are_their_formulas_written_as_a_loop():
    prediction, target, scale, _ = make_inputs((2, 2, 3, 5), (torch.float64, torch.float64), "cpu")
    found = {loss: token_distance(prediction, target, scale, loss=loss, backend="reference") for loss in LOSSES}
    for b, v, t in torch.ones(2, 2, 3).nonzero().tolist():
        p, y = prediction[b, v, t], target[b, v, t] * scale.double()
        torch.testing.assert_close(found["mse"][b, v, t], sum((p - y) ** 2) / 5)
        torch.testing.assert_close(found["l1"][b, v, t], sum(abs(p - y)) / 5)
        torch.testing.assert_close(found["cosine"][b, v, t], 1 - sum(p * y) / (sum(p * p) * sum(y * y)).sqrt())


@pytest.mark.parametrize("loss_on", ["all", "hidden", "visible"])
def test_loss_is_the_mean_of_every_image_first_and_then_over_images(loss_on):
    prediction, target, scale, _ = make_inputs((3, 2, 6, 4), (torch.float32, torch.float32), "cpu")
    visible = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[2] = True  # nothing is hidden in the last image
    loss, per_token = reconstruction_loss(prediction, target, scale, visible, loss_on=loss_on)
    images = []
    for image in range(3):
        patches = per_token[image, :, 1:]
        chosen = {"hidden": patches[~visible[image]], "visible": patches[visible[image]]}
        tokens = chosen.get(loss_on, per_token[image].flatten())
        images.append(tokens.mean() if len(tokens) else torch.zeros(()))
    assert images[2] == 0 or loss_on != "hidden"
    torch.testing.assert_close(loss, torch.stack(images).mean())


def test_reference_has_right_first_and_second_derivatives():
    prediction, target, scale, _ = make_inputs((2, 1, 2, 4), (torch.float64, torch.float64), "cpu")
    for loss in ("mse", "cosine"):

        def op(prediction, loss=loss):
            return token_distance(prediction, target, scale, loss=loss, backend="reference").square()

        assert torch.autograd.gradcheck(op, prediction.requires_grad_())
        assert torch.autograd.gradgradcheck(op, prediction.requires_grad_())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("backend", FUSED)
def test_fused_backends_equal_the_reference(backend, shape, dtypes, loss, device):
    usable(backend, device)
    inputs = make_inputs(shape, dtypes, device)
    found, same, truth = run(*inputs, loss, backend), run(*inputs, loss, "reference"), truth_of(*inputs, loss)
    for name, a, b, c in zip(("distance", "prediction.grad"), found, same, truth, strict=True):
        assert_close_as_dtype_allows(a, b, c, name)
        assert_no_lost_gradient(a, c, name)


@pytest.mark.parametrize("width", [768, 1152, 4104])  # packs of eight: all in one go, a rest of lanes, several rounds
@pytest.mark.parametrize("backend", FUSED)
def test_wide_tokens_equal_the_reference(backend, width, device):
    usable(backend, device)
    for loss in ("mse", "cosine"):
        inputs = make_inputs((1, 1, 3, width), (torch.bfloat16, torch.float32), device)
        found, same, truth = run(*inputs, loss, backend), run(*inputs, loss, "reference"), truth_of(*inputs, loss)
        for name, a, b, c in zip(("distance", "prediction.grad"), found, same, truth, strict=True):
            assert_close_as_dtype_allows(a, b, c, f"{loss} {name}")


@pytest.mark.parametrize("backend", FUSED)
def test_a_prediction_near_its_target_keeps_its_small_gradient(backend, device):
    usable(backend, device)
    prediction, target, scale, grad = make_inputs((1, 2, 3, 64), (torch.float32, torch.float32), device)
    near = target * scale * (1 + 1e-3 * prediction)
    for loss in LOSSES:
        inputs = (near, target, scale, grad)
        found, same, truth = run(*inputs, loss, backend), run(*inputs, loss, "reference"), truth_of(*inputs, loss)
        for name, a, b, c in zip(("distance", "prediction.grad"), found, same, truth, strict=True):
            assert_close_as_dtype_allows(a, b, c, f"{loss} {name}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", FUSED)
def test_zeros_and_equal_inputs_have_the_reference_s_subgradients(backend, loss, device):
    """A norm of 0 or below 1e-8, and a difference of 0."""
    usable(backend, device)
    prediction, target, scale, grad = make_inputs((1, 1, 4, 16), (torch.float32, torch.float32), device)
    prediction[0, 0, 0], target[0, 0, 1] = 0, 0
    prediction[0, 0, 2] *= 1e-10
    prediction[0, 0, 3, ::2] = target[0, 0, 3, ::2] * scale
    found, expected = (run(prediction, target, scale, grad, loss, who) for who in (backend, "reference"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert found[1].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", FUSED)
def test_what_is_not_finite_goes_where_the_reference_lets_it(backend, loss, value, device):
    usable(backend, device)
    for place in ("prediction", "target"):
        prediction, target, scale, grad = make_inputs((1, 2, 3, 16), (torch.float32, torch.float32), device)
        (prediction if place == "prediction" else target)[0, 1, 1, 3] = value
        found, expected = (run(prediction, target, scale, grad, loss, who) for who in (backend, "reference"))
        assert not found[0][0, 1, 1].isfinite()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", FUSED)
def test_an_infinite_scale_makes_nan_of_no_padding(backend, device):
    """The scale of targets that are all the same: infinite distances, as the reference has them, and not NaN."""
    usable(backend, device)
    prediction, target, _, grad = make_inputs((1, 1, 2, 33), (torch.float32, torch.float32), device)
    scale = torch.tensor(float("inf"), device=device)
    assert run(prediction, target, scale, grad, "l1", backend)[0].isposinf().all()


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_strided_inputs_give_what_contiguous_ones_give(backend, device):
    """Sliced tokens, as target last_cls leaves them; an expanded target; a width that is not the last in memory."""
    usable(backend, device)
    prediction, target, scale, grad = make_inputs((2, 3, 4, 24), (torch.float32, torch.float32), device)
    strided = {
        "sliced": (prediction[:, :, :1], target[:, :, :1], grad[:, :, :1]),
        "cut in the middle": (prediction[:, 1:, 1:3, 8:], target[:, 1:, 1:3, 8:], grad[:, 1:, 1:3]),
        "expanded": (prediction, target[:, :1, :1].expand_as(target), grad[:, :1, :1].expand_as(grad)),
        "transposed": (prediction.transpose(0, 2), target.transpose(0, 2), grad.transpose(0, 2)),
        "channels first": (
            prediction.transpose(2, 3).contiguous().transpose(2, 3),
            target,
            grad.transpose(1, 2).contiguous().transpose(1, 2),
        ),
    }
    for name, (p, y, g) in strided.items():
        for loss in ("mse", "cosine"):
            found = run(p, y, scale, g, loss, backend)
            expected = run(p.contiguous(), y.contiguous(), scale, g.contiguous(), loss, backend)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=f"{name}, {loss}")


def test_axes_are_merged_where_strides_allow_and_name_the_same_tokens():
    a, b = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    wanted = {
        (24, 1, 1): (a, b),
        (6, 1, 2): (a[:, :, :2], b[:, :, :2]),
        (2, 1, 8): (a[:, :2], b[:, :2]),
        (4, 3, 2): (a.transpose(0, 2), b.transpose(0, 2)),
        (6, 1, 1): (a[:, :, 1:2], b[:, :, 1:2]),
        (4, 1, 1): (a[:1, :1], b[:1, :1]),
    }
    for sizes, tensors in wanted.items():
        for before, after in zip(tensors, merged(*tensors), strict=True):
            assert after.shape[:3] == sizes
            assert torch.equal(after.reshape(-1, 5), before.reshape(-1, 5))
            assert after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()


@pytest.mark.parametrize("backend", FUSED)
def test_runs_give_the_same_bits_every_time(backend, device):
    usable(backend, device)
    inputs = make_inputs((2, 3, 4, 72), (torch.float32, torch.float32), device)
    for loss in LOSSES:
        first, second = run(*inputs, loss, backend), run(*inputs, loss, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_an_empty_batch_has_no_distances(backend, device):
    usable(backend, device)
    for loss in LOSSES:
        distance, grad = run(*make_inputs((0, 2, 3, 8), (torch.float32, torch.float32), device), loss, backend)
        assert distance.shape == (0, 2, 3) and grad.shape == (0, 2, 3, 8)


@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_the_gradient_has_the_prediction_s_dtype_and_distances_are_fp32(backend, device):
    usable(backend, device)
    distance, grad = run(*make_inputs((1, 1, 2, 8), (torch.bfloat16, torch.float32), device), "mse", backend)
    assert (distance.dtype, grad.dtype) == (torch.float32, torch.bfloat16)


def test_the_scale_is_multiplied_in_fp32():
    """One third of a bf16 target is not rounded to bf16."""
    target, scale = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.tensor(1 / 3)
    distance = token_distance(torch.zeros_like(target), target, scale, loss="l1", backend="reference")
    assert distance.item() == scale.item() != scale.bfloat16().item()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ("reference", *FUSED))
def test_ops_pass_opcheck(backend, loss, device):
    usable(backend, device)
    if backend == "reference":
        pytest.skip("is no op: plain PyTorch")
    prediction, target, scale, grad = make_inputs((1, 2, 3, 8), (torch.float32, torch.float32), device)
    prediction.requires_grad_()
    torch.library.opcheck(torch.ops.locfast.reconstruction_loss.default, (prediction, target, scale, loss, backend))
    _, slopes = torch.ops.locfast.reconstruction_loss(prediction.detach(), target, scale, loss, backend)
    arguments = (grad, prediction.detach(), target, scale, slopes, loss, backend)
    torch.library.opcheck(torch.ops.locfast.reconstruction_loss_backward.default, arguments)


def test_compiled_method_takes_the_op_without_a_graph_break(device):
    usable("cuda", device)
    prediction, target, scale, _ = make_inputs((2, 3, 4, 16), (torch.float32, torch.float32), device)
    visible = torch.rand(2, 3, 3, device=device) < 0.5

    def step(backend):
        p = prediction.detach().requires_grad_()

        def function(p):
            loss, per_token = reconstruction_loss(p * 2, target, scale, visible, loss_on="hidden", backend=backend)
            return loss, per_token.detach()

        loss, per_token = torch.compile(function, backend="aot_eager", fullgraph=True)(p)
        loss.backward()
        return loss.detach(), per_token, p.grad

    for a, b in zip(step("cuda"), step("reference"), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FUSED)
def test_offsets_beyond_32_bits_are_right(backend):
    """2^31 elements and some more: 4 GiB of bf16 prediction, and as much of its gradient; the target is expanded."""
    device, width = torch.device("cuda"), 1024
    tokens = 2**21 + 3
    prediction = torch.zeros(1, 1, tokens, width, dtype=torch.bfloat16, device=device)
    prediction[0, 0, -1] = 2.0
    target = torch.ones(1, 1, 1, width, dtype=torch.bfloat16, device=device).expand_as(prediction)
    grad = torch.ones(1, 1, tokens, device=device)
    scale = torch.ones((), device=device)
    distance, found = run(prediction, target, scale, grad, "mse", backend)
    assert (distance == 1).all()
    assert (found[0, 0, -1] == 2 / width).all() and (found[0, 0, :-1] == -2 / width).all()


@pytest.mark.parametrize(
    ("change", "wanted", "found"),
    [
        (dict(prediction=torch.zeros(2, 4, 8)), r"\[B, V, T, C\]", r"\[2, 4, 8\]"),
        (dict(target=torch.zeros(2, 3, 5, 9)), "both", r"\[2, 3, 5, 9\]"),
        (dict(target=torch.zeros(2, 1, 1, 8)), "both", r"\[2, 1, 1, 8\]"),
        (dict(target=torch.zeros(2, 3, 5, 8, dtype=torch.int64)), "floating", "int64"),
        (dict(scale=torch.ones(2)), "one number", r"\[2\]"),
        (dict(loss="huber"), "mse, l1, cosine", "huber"),
        (dict(loss_on="masked"), "all, hidden, visible", "masked"),
        (dict(loss_on="hidden", visible=None), r"bool \[2, 3, N\]", "None"),
        (dict(loss_on="hidden", visible=torch.zeros(2, 3, 4)), r"bool \[2, 3, N\]", "float32"),
        (dict(loss_on="hidden", visible=torch.zeros(2, 3, 6, dtype=torch.bool)), "6 patches", "5 tokens"),
        (dict(target=torch.zeros(2, 3, 5, 8, requires_grad=True)), "target requires a gradient", r"target.detach\(\)"),
        (dict(scale=torch.ones((), requires_grad=True)), "scale requires a gradient", r"scale.detach\(\)"),
        (dict(prediction=torch.zeros(2, 3, 5, 0), target=torch.zeros(2, 3, 5, 0)), "width of 0", r"\[2, 3, 5, 0\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_wanted_and_found(change, wanted, found):
    inputs = dict(prediction=torch.zeros(2, 3, 5, 8), target=torch.zeros(2, 3, 5, 8), scale=torch.ones(()))
    inputs |= dict(visible=torch.zeros(2, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"(?s){wanted}.*{found}"):
        reconstruction_loss(**(inputs | change))


def test_targets_need_no_detaching_where_nothing_is_differentiated():
    inputs = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4, requires_grad=True), torch.ones(())
    with torch.no_grad():
        assert reconstruction_loss(*inputs)[0] == F.mse_loss(inputs[0], inputs[1])
