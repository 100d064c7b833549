"""The optimised step against the one that the public code takes: loss and the gradient of every parameter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from locfast.config.maskembed import MaskEmbedConfig
from locfast.engine.flops import count_flops
from locfast.kernels import _backend
from locfast.methods import maskembed
from locfast.methods.maskembed import Draw, MaskEmbed
from locfast.models import compiled, teacher
from tests.kernels.tolerance import assert_close_as_dtype_allows

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "models")]
from baselines.maskembed import PublicStep  # noqa: E402  # scripts beside each other, not a package
from model_families import images, small  # noqa: E402

KINDS = ("clip", "siglip", "dinov2_reg", "eva02", "beit")
CAPS = {"eva02": None, "beit": None}
"""As the recipes: the public code caps neither."""


def make(kind: str, monkeypatch: pytest.MonkeyPatch, views: int = 3, device: str | torch.device = "cpu") -> MaskEmbed:
    """MaskEmbed on a small backbone, its parameters moved away from where they start: zeros would hide mistakes."""
    monkeypatch.setattr(maskembed, "load_backbone", lambda *_, **__: small(kind))
    config = MaskEmbedConfig(softcap=CAPS.get(kind, 30.0), complement=views > 1, all_visible=views > 2)
    method = MaskEmbed(config, model=kind)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in [*method.head.parameters(), *method.decoder.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        method.target_scale.fill_(0.7)
    return method.to(device)


def sample(method: MaskEmbed, views: int, samples: int = 4) -> tuple[dict, Draw]:
    """Images and masks; the first image's first view shows nothing, the second's everything."""
    visible = torch.rand(samples, views, method.teacher.num_patches, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[0, 0], visible[1, 0] = False, True
    parameter = next(method.parameters())
    return (
        {"views": {"image": images(method.teacher, samples).to(parameter)}},
        Draw(visible.to(parameter.device)),
    )


def loss_and_gradients(step: nn.Module, batch: dict, draw: Draw) -> dict[str, Tensor]:
    loss = step(batch, draw)["loss"]
    named = {name: p for name, p in step.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return {"loss": loss.detach()} | dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_step_equals_the_public_one_in_fp64(kind, views, monkeypatch, device):
    method = make(kind, monkeypatch, views, device).double()
    batch, draw = sample(method, views)
    wanted = loss_and_gradients(PublicStep(method), batch, draw)
    found = loss_and_gradients(method, batch, draw)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        largest = float(wanted[name].abs().max())
        # sums in another order: fp64 rounds to 2e-16, times the condition of a few hundred such sums
        error = float((value - wanted[name]).abs().max())
        assert error <= 1e-10 * largest, f"{name}: {error:.3g} of {largest:.3g}"


@pytest.mark.parametrize("kind", KINDS)
def test_step_equals_the_public_one_in_fp32_to_rounding(kind, monkeypatch, device):
    method = make(kind, monkeypatch, device=device)
    batch, draw = sample(method, 3)
    same, exact = loss_and_gradients(PublicStep(method), batch, draw), truth(method, batch, draw)
    for name, value in loss_and_gradients(method, batch, draw).items():
        # both round sums of up to 10^4 terms, in orders of their own: each is off fp64 by a few units of the largest
        allowed = (
            2 * (same[name] - exact[name]).abs().max() + 8 * torch.finfo(torch.float32).eps * exact[name].abs().max()
        )
        error = (value - exact[name]).abs().max()
        assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("kind", KINDS)
def test_step_in_bf16_is_as_right_as_the_readable_one(kind, monkeypatch, device):
    method = make(kind, monkeypatch, device=device)
    batch, draw = sample(method, 3)
    exact = truth(method, batch, draw)
    with torch.autocast(device.type, torch.bfloat16):
        same = loss_and_gradients(PublicStep(method), batch, draw)
        found = loss_and_gradients(method, batch, draw)
    compare(found, same, exact, torch.bfloat16)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("tiled", torch.float32), ("triton", torch.float32), ("cuda", torch.bfloat16)], ids=str
)
def test_every_backend_takes_the_same_step(backend, dtype, monkeypatch, device):
    method = make("clip", monkeypatch, device=device)
    batch, draw = sample(method, 3)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        same = loss_and_gradients(PublicStep(method), batch, draw)
        with _backend.use_backend(backend):
            found = loss_and_gradients(method, batch, draw)
    compare(found, same, truth(method, batch, draw), dtype)


def truth(method: MaskEmbed, batch: dict, draw: Draw) -> dict[str, Tensor]:
    wide = {"views": {"image": batch["views"]["image"].double()}}
    return loss_and_gradients(PublicStep(method).double(), wide, draw)


def compare(
    found: dict[str, Tensor], same: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    for name, value in found.items():
        assert_close_as_dtype_allows(value, same[name], exact[name], name, computed_in=dtype)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operator puts out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_a_step_is_as_large_as_the_pixels_of_all_views(monkeypatch):
    method = make("clip", monkeypatch)
    batch, draw = sample(method, 3)
    pixels = 3 * batch["views"]["image"].numel()
    sizes = {}
    for step in (method, PublicStep(method)):
        with LargestTensor() as largest:
            loss_and_gradients(step, batch, draw)
        sizes[type(step).__name__] = largest.elements
    assert sizes["MaskEmbed"] < pixels / 2 < pixels <= sizes["PublicStep"]


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_looks_at_views_as_timm_does_at_masked_pixels(kind, monkeypatch):
    method = make(kind, monkeypatch).double()
    batch, draw = sample(method, 3)
    found = method.target(batch["views"]["image"], draw.visible)
    wanted = PublicStep(method).target(batch["views"]["image"], draw.visible)
    torch.testing.assert_close(found.flatten(0, 1), wanted, rtol=1e-10, atol=1e-10)


def test_flops_of_a_step_can_be_counted_in_fp32(monkeypatch):
    """torch's counter wraps modules, and their inputs, in functions of autograd."""
    method = make("clip", monkeypatch)
    batch, draw = sample(method, 3)
    assert count_flops(method, batch, draw, "fp32") > 0


def test_a_graph_and_compiled_blocks_go_together(monkeypatch):
    """What is captured are the compiled blocks: training's first step comes behind `enable_compile`."""
    marks = []

    class Captured:
        def __init__(self, run, images, visible):
            marks.append(all(block.compiled for block in method.teacher.blocks))
            self.run = run

        def fits(self, images, visible):
            return True

        def __call__(self, images, visible):
            return self.run(images, visible)

    monkeypatch.setattr(teacher, "CapturedPass", Captured)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    compiled.compiled.cache_clear()
    method = make("clip", monkeypatch)
    method.teacher_pass.graph = True
    batch, draw = sample(method, 3)
    method.prepare([(batch, draw)], lambda sums: sums)
    method.enable_compile()
    method(batch, draw)["loss"].backward()
    compiled.compiled.cache_clear()
    assert marks == [True]
