"""Rows as e4m3 with a scale each: every backend gives the bits of the formula, written out another way."""

import numpy as np
import pytest
import torch

from locfast.kernels import _backend
from locfast.kernels.quantize_rows import quantize_rows, reference

WIDTHS = [1, 16, 96, 768, 1152, 4304]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def usable(backend: str, device: torch.device) -> None:
    if backend != "reference" and (reason := _backend.triton_fp8_probe(device, torch.float32)):
        pytest.skip(reason)


def e4m3() -> np.ndarray:
    """The finite magnitudes of e4m3 by their codes 0 .. 126: 3 bits of mantissa, bias 7, subnormals below 2^-6."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))


def nearest_code(x: np.ndarray) -> np.ndarray:
    """The code of the nearest e4m3 number, of the even one where two are as near. x in fp64, at most 448."""
    table = e4m3()
    above = np.searchsorted(table, np.abs(x)).clip(1, 126)
    below = above - 1
    up, down = table[above] - np.abs(x), np.abs(x) - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (code | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def rows(width: int, dtype: torch.dtype, count: int = 9) -> torch.Tensor:
    """Small and large rows, one with an outlier, one of zeros."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(width))
    x *= torch.tensor([1.0, 1e-3, 100.0]).repeat(count // 3)[:, None]
    x[3, 0], x[4] = 3000.0, 0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_codes_and_scales_are_those_of_the_formula_to_the_bit(backend, width, dtype, device):
    usable(backend, device)
    x = rows(width, dtype)
    codes, scale = quantize_rows(x.to(device), backend=backend)
    assert (codes.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    wide = x.float().numpy()
    largest = np.maximum(np.abs(wide).max(1, keepdims=True), np.float32(2.0**-100))
    inverse = (448 / largest.astype(np.float64)).astype(np.float32)  # fp64, then fp32: one rounding for 24-bit operands
    scaled = (wide.astype(np.float64) * inverse).astype(np.float32)
    assert np.array_equal(scale.cpu().numpy(), largest * np.float32(1 / 448))
    assert np.array_equal(codes.view(torch.uint8).cpu().numpy(), nearest_code(scaled.astype(np.float64)))


def test_the_cast_rounds_every_tie_to_even_and_the_largest_code_is_448():
    values = torch.from_numpy(e4m3())
    assert values.max() == 448
    middles = (values[1:] + values[:-1]).float() / 2
    x = torch.cat([middles, -middles, torch.tensor([448.0])])[None]
    codes, scale = quantize_rows(x)
    assert scale.item() == np.float32(448) * np.float32(1 / 448) == 1
    assert np.array_equal(codes.view(torch.uint8)[0].numpy(), nearest_code(x[0].double().numpy()))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_zeros_stay_zero_and_a_row_that_is_not_finite_spoils_itself_alone(backend, device):
    usable(backend, device)
    x = torch.ones(4, 16)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, -torch.inf
    codes, scale = quantize_rows(x.to(device), backend=backend)
    product = (codes.float() * scale).cpu()
    assert torch.equal(product[0], torch.zeros(16)) and scale[0] > 0
    assert product[1].isnan().any() and product[2].isnan().any()
    assert torch.equal(product[3], torch.ones(16))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_leading_dimensions_strides_and_empty_batches_are_kept(backend, device):
    usable(backend, device)
    x = torch.randn(3, 32, 5, device=device).transpose(1, 2)
    codes, scale = quantize_rows(x, backend=backend)
    assert (codes.shape, scale.shape) == ((3, 5, 32), (3, 5, 1))
    flat, flat_scale = reference.quantize_rows(x.reshape(15, 32))
    assert torch.equal(codes.float(), flat.float().view(3, 5, 32)) and torch.equal(scale, flat_scale.view(3, 5, 1))
    codes, scale = quantize_rows(x[:0], backend=backend)
    assert (codes.shape, scale.shape) == ((0, 5, 32), (0, 5, 1))


def test_every_code_is_within_half_a_step_of_its_number():
    x = rows(768, torch.float32)
    codes, scale = quantize_rows(x)
    error = (codes.float() * scale - x).abs()
    # 3 bits of mantissa: 2^-4 of the number; 2^-10 of a subnormal's unit; the scale itself is off by 2^-23
    assert (error <= x.abs() * (2**-4 + 2**-22) + 2**-10 * scale).all()


def test_op_passes_opcheck(device):
    usable("triton", device)
    torch.library.opcheck(torch.ops.locfast.quantize_rows.default, (torch.randn(3, 2, 16, device=device),))


def test_compiled_code_takes_plain_pytorch_without_a_graph_break():
    x = torch.randn(5, 32)
    compiled = torch.compile(lambda x: quantize_rows(x * 2), backend="aot_eager", fullgraph=True)
    for found, wanted in zip(compiled(x), quantize_rows(x * 2), strict=True):
        assert torch.equal(found.float(), wanted.float())


def test_dtypes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"fp32, bf16 or fp16, got \[2\] in torch.int64"):
        quantize_rows(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="float64"):
        quantize_rows(torch.ones(2, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_gpu_gives_the_same_bits_as_the_cpu(backend, dtype):
    usable(backend, torch.device("cuda"))
    x = torch.randn(1001, 4304, generator=torch.Generator().manual_seed(0)).exp().to(dtype)
    codes, scale = quantize_rows(x.cuda(), backend=backend)
    on_cpu, cpu_scale = quantize_rows(x)
    assert torch.equal(codes.view(torch.uint8).cpu(), on_cpu.view(torch.uint8))
    assert torch.equal(scale.cpu(), cpu_scale)
