"""Linear layers in fp8: what is quantised, what is multiplied, and what stays as it was."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from model_families import SMALL, images, small
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from locfast.errors import UserError
from locfast.kernels.quantize_rows import quantize_rows
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.blocks import run_block
from locfast.models.fp8 import Fp8Linear, check_fp8, fp8_linear, quantise_blocks


def layer(inside: int = 96, outside: int = 48, bias: bool = True) -> Fp8Linear:
    """A linear layer with lively weights, some channels a hundred times larger than others."""
    torch.manual_seed(0)
    linear = nn.Linear(inside, outside, bias).requires_grad_(False)
    linear.weight *= torch.logspace(-1, 1, outside)[:, None]
    linear.__class__ = Fp8Linear
    assert isinstance(linear, Fp8Linear)
    linear.fast_accum = True
    linear.quantise()
    return linear


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def exact(x: Tensor, linear: Fp8Linear) -> tuple[Tensor, Tensor]:
    """The product of the dequantised operands in fp64, and the sum of its terms' magnitudes."""
    rows, scale = quantize_rows(x)
    wide = rows.double() * scale.double()
    weight = linear.codes.view(torch.float8_e4m3fn).double() * linear.scale.double()
    bias = 0 if linear.bias is None else linear.bias.double()
    return wide @ weight.T + bias, wide.abs() @ weight.abs().T + abs(bias)


def layers(module: nn.Module) -> list[Fp8Linear]:
    return [m for m in module.modules() if isinstance(m, Fp8Linear)]


def masks(backbone: Backbone) -> Tensor:
    return torch.rand(2, 3, backbone.num_patches, generator=torch.Generator().manual_seed(2)) < 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_a_cpu_multiplies_the_dequantised_operands_in_fp32(bias: bool) -> None:
    linear, x = layer(bias=bias), tokens(2, 5, 96)
    out = linear(x)
    wanted, magnitude = exact(x, linear)
    assert out.dtype == torch.float32 and out.shape == (2, 5, 48)
    # an fp32 sum of 97 terms, and two roundings to dequantise: at most a unit of 2^-24 each
    assert ((out - wanted).abs() <= 100 * 2**-24 * magnitude).all()


def test_the_product_is_that_of_pytorchs_scaled_product_where_a_cpu_has_it() -> None:
    linear, x = layer(), tokens(7, 96)
    rows, scale = quantize_rows(x)
    codes = linear.codes.view(torch.float8_e4m3fn)
    try:
        found = torch._scaled_mm(rows, codes.t(), scale_a=scale, scale_b=linear.scale.t(), out_dtype=torch.float32)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} scales no rows on a CPU: {str(error).splitlines()[0]}")
    _, magnitude = exact(x, linear)
    assert ((found + linear.bias - linear(x)).abs() <= 100 * 2**-24 * magnitude).all()


def test_weights_have_one_scale_for_each_output_channel() -> None:
    linear = layer()
    codes, scale = quantize_rows(linear.weight)
    assert torch.equal(linear.codes, codes.view(torch.uint8)) and torch.equal(linear.scale, scale)
    assert scale.shape == (48, 1) and scale.max() > 50 * scale.min()
    weight = codes.float() * scale
    # e4m3 is off by 2.6 % rms where numbers are spread over its steps; one scale for all channels would be no worse
    # in sum, but useless for the small ones
    assert ((weight - linear.weight).norm(dim=1) < 0.03 * linear.weight.norm(dim=1)).all()


def test_a_token_does_not_change_what_another_gives() -> None:
    linear, x = layer(), tokens(6, 96)
    other = x.clone()
    other[2] *= 1000
    other[4] = torch.nan
    before, after = linear(x), linear(other)
    for kept in (0, 1, 3, 5):
        assert torch.equal(before[kept], after[kept])
    assert after[4].isnan().all() and after[2].isfinite().all()


def test_autocast_chooses_the_results_dtype_and_not_the_products() -> None:
    linear, x = layer(), tokens(6, 96)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x)
    wanted = fp8_linear(
        *quantize_rows(x), linear.codes.view(torch.float8_e4m3fn), linear.scale, linear.bias, torch.bfloat16
    )
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)
    exactly, magnitude = exact(x, linear)
    # one rounding of the result to 8 bits and one of the bias
    assert ((out - exactly).abs() <= 2**-8 * magnitude).all()
    assert ((out - exactly).norm() <= 2**-8 * exactly.norm()).item()


def test_the_quantised_copy_follows_the_weight() -> None:
    linear, other = layer(), layer()
    other.load_state_dict({name: 3 * value for name, value in linear.state_dict().items()})
    assert torch.equal(other.codes, quantize_rows(3 * linear.weight)[0].view(torch.uint8))
    assert not torch.equal(other.scale, linear.scale)
    assert layer().to(torch.float64).scale.dtype == torch.float32  # scales are fp32 whatever the weights are
    assert torch.equal(copy.deepcopy(linear).codes, linear.codes)


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_targets_of_every_family_are_near_those_of_fp32(kind: str) -> None:
    backbone = small(kind)
    keys, weights = list(backbone.state_dict()), copy.deepcopy(backbone.state_dict())
    x, visible = images(backbone), masks(backbone)
    plain = backbone.masked_features(x, visible)
    assert quantise_blocks(backbone, backbone.depth - 1) is backbone
    assert len(layers(backbone)) >= 8 and not layers(backbone.blocks[-1])
    found = backbone.masked_features(x, visible)
    # Each product is off by some 4 % of its size (2.6 % an operand), beside residuals that are not: measured 0.3 % to
    # 0.7 % of the targets. A layer that is left out or wrong shows as 10 % and more, or as no difference at all.
    assert 1e-3 < (found - plain).norm() / plain.norm() < 0.02
    assert list(backbone.state_dict()) == keys
    assert all(torch.equal(weights[name], value) for name, value in backbone.state_dict().items())


@torch.no_grad()
def test_beit_keeps_the_biases_that_its_layers_do_not_own() -> None:
    backbone = small("beit")
    attn = backbone.blocks[0].attn
    assert attn.qkv.bias is None and attn.q_bias is not None
    quantise_blocks(backbone)
    x = tokens(2, 17, 64)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    torch.testing.assert_close(attn.qkv.multiply(x, bias), attn.qkv(x) + bias)
    before = backbone.run_blocks(x)
    attn.q_bias += 1
    assert not torch.equal(backbone.run_blocks(x), before)


def test_the_flop_counter_counts_what_it_counted_before() -> None:
    backbone = small("clip")
    x, visible = images(backbone), masks(backbone)
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone.masked_features(x, visible)
        counts.append(counter.get_total_flops())
        quantise_blocks(backbone)
    assert counts[0] == counts[1] > 0


@torch.no_grad()
def test_a_block_compiles_into_one_graph() -> None:
    backbone = quantise_blocks(small("clip"))
    x = tokens(2, 17, 64)
    compiled = torch.compile(run_block, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (run(backbone.blocks[0], x) for run in (compiled, run_block))
    assert torch.equal(found, wanted)


def test_layers_with_odd_sides_stay_as_they_are_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    backbone = load_backbone("vit_tiny_patch16_224", False, image_size=32, depth=2, embed_dim=24, num_heads=2)
    with caplog.at_level(logging.WARNING):
        quantise_blocks(backbone)
    assert not layers(backbone)
    assert "8 linear layers stay as they are" in caplog.text and "attn.qkv [72, 24]" in caplog.text


def test_blocks_that_only_timm_can_run_are_refused() -> None:
    backbone = load_backbone("vit_tiny_patch16_224", False, image_size=32, depth=2)
    backbone.knows_blocks = False
    with pytest.raises(UserError, match="run only as timm wrote them. Type --maskembed.teacher-precision same"):
        quantise_blocks(backbone)
    assert not layers(backbone)


def test_an_older_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match="NVIDIA A100 has compute capability 8.0, and fp8 products need 8.9"):
        check_fp8(torch.device("cuda"), torch.bfloat16)
    check_fp8(torch.device("cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("count", [1, 17, 197, 1154])
@pytest.mark.parametrize(("inside", "outside"), [(96, 48), (1024, 3072), (4304, 1152)])
def test_a_gpu_multiplies_the_same_operands(inside: int, outside: int, count: int, fast_accum: bool) -> None:
    linear, x = layer(inside, outside), tokens(count, inside)
    wanted, magnitude = exact(x, linear)
    codes, scale = linear.codes, linear.scale
    linear.cuda().fast_accum = fast_accum
    assert torch.equal(linear.codes.cpu(), codes) and torch.equal(linear.scale.cpu(), scale)
    with torch.autocast("cuda", torch.bfloat16):
        out = linear(x.cuda()).cpu()
    assert out.dtype == torch.bfloat16
    error = (out - wanted).abs()
    # sm_90's tensor cores add 32 products at a time to a sum that they keep to about 14 bits: 2^-13 of it is lost each
    # time; promoted to fp32 after every fourth without fast_accum. Bias and result are rounded to bf16.
    lost = (inside / 32 if fast_accum else 4) * 2**-13
    assert (error <= (lost + 2**-8) * magnitude).all()
    assert error.norm() <= (lost + 2**-8) * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_gpu_gives_the_targets_of_the_cpu(compiled: bool) -> None:
    backbone = quantise_blocks(small("clip"))
    x, visible = images(backbone), masks(backbone)
    plain = small("clip").masked_features(x, visible)
    wanted = backbone.masked_features(x, visible)
    backbone.cuda()
    run = torch.compile(backbone.masked_features) if compiled else backbone.masked_features
    with torch.autocast("cuda", torch.bfloat16):
        found = run(x.cuda(), visible.cuda()).float().cpu()
    # a bf16 activation that lies elsewhere moves codes by whole steps: two fp8 models differ by what each is off
    assert (found - wanted).norm() < 2 * (wanted - plain).norm()
    assert (found - plain).norm() < 2 * (wanted - plain).norm()
