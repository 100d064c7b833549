"""Pieces of a tile that the soft-capped attention kernels share: tanh, loads and products of heads in two parts.

A head dim is cut into two powers of two (72 = 64 + 16, of which 8 are zeros; 80 = 64 + 16; 96 = 64 + 32), because a
Triton tile has sides that are powers of two and 128 would be 1.6 times the work at 80.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x, OF_E: tl.constexpr):
    """2^x by the hardware; or e^x to the last bit for fp32, where weights near 1 would show two bits of the hardware's.

    Of e, because a cap times log2(e), rounded to fp32, would stretch all logits alike.
    """
    if OF_E:
        x = tl.where(x < -87.5, -87.5, x)  # below lies zero; NaN stays
        whole = tl.floor(x * LOG2E + 0.5)
        rest = tl.fma(whole, -0.693145751953125, x)  # log(2) in two parts, of which the first has few bits
        rest = tl.fma(whole, -1.42860682030941723e-6, rest) * LOG2E
        p = 1.535336181e-4 * rest + 1.339887445e-3
        p = p * rest + 9.618437358e-3
        p = p * rest + 5.550332471e-2
        p = p * rest + 2.402264791e-1
        p = p * rest + 6.931472029e-1
        y = (p * rest + 1.0) * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def _hardware_tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _exponential_tanh(x):
    """To 1e-7 absolutely, enough where products are rounded to 11 bits: two special functions and no selection."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def _accurate_tanh(x):
    """To 1e-7 relatively: a polynomial below 5/8, where 1 - exp would cancel, and exponentials beyond."""
    square = x * x
    p = -0.00571704909 * square + 0.0206505913
    p = p * square - 0.0537434995
    p = p * square + 0.133314913
    p = p * square - 0.333332839
    near = x + x * square * p
    e = exponential(tl.abs(x) * -2.0, True)
    far = 1.0 - tl.div_rn(2.0 * e, 1.0 + e)  # half as far off as (1 - e) / (1 + e), whose three roundings all count
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def squash(scores, scale, TANH: tl.constexpr):
    """What logits are made of: tanh(scores * scale) with scale = logit scale / cap; without a cap scores * scale."""
    x = scores * scale
    if TANH == "hardware":
        x = _hardware_tanh(x)
    elif TANH == "exponential":
        x = _exponential_tanh(x)
    elif TANH == "accurate":
        x = _accurate_tanh(x)
    return x


REST_SCALE: tl.constexpr = tl.constexpr(2048.0)
"""Of what rounding to fp16 lost: that is 2^-11 of a value at most, and would fall below the normal numbers."""
ROUND_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 t;
    cvt.rn.bf16x2.f32 $0, $4, $3;
    shl.b32 t, $0, 16;
    mov.b32 $1, t;
    and.b32 t, $0, 0xffff0000;
    mov.b32 $2, t;
}""")
ROUND_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b16 low, high;
    cvt.rn.f16x2.f32 $0, $4, $3;
    mov.b32 {low, high}, $0;
    cvt.f32.f16 $1, low;
    cvt.f32.f16 $2, high;
}""")


@triton.jit
def round_and_widen(x, KIND: tl.constexpr):
    """x in bf16 or fp16, and that in fp32 again.

    In assembly because Triton compiles such a pair to one conversion for each element, on the special-function unit.
    """
    if KIND == tl.bfloat16:  # noqa: SIM300
        y, z = tl.inline_asm_elementwise(
            ROUND_BF16, "=r,=f,=f,f,f", [x], dtype=(tl.bfloat16, tl.float32), is_pure=True, pack=2
        )
    else:
        y, z = tl.inline_asm_elementwise(
            ROUND_FP16, "=r,=f,=f,f,f", [x], dtype=(tl.float16, tl.float32), is_pure=True, pack=2
        )
    return y, z


@triton.jit
def load_parts(ptr, token, stride, inside, CHECK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Tokens [rows, D0] and [rows, D1] of a head, zeros where not `inside` and beyond D; without D1 one part twice."""
    rows = ptr + token.to(tl.int64)[:, None] * stride
    d0 = tl.arange(0, D0)
    if D0 > D:
        part0 = tl.load(rows + d0[None, :], mask=inside[:, None] & (d0 < D)[None, :], other=0.0)
    elif CHECK:
        part0 = tl.load(rows + d0[None, :], mask=inside[:, None], other=0.0)
    else:
        part0 = tl.load(rows + d0[None, :])
    part1 = part0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        if D0 + D1 > D:
            part1 = tl.load(rows + d1[None, :], mask=inside[:, None] & (d1 < D)[None, :], other=0.0)
        elif CHECK:
            part1 = tl.load(rows + d1[None, :], mask=inside[:, None], other=0.0)
        else:
            part1 = tl.load(rows + d1[None, :])
    return part0, part1


@triton.jit
def store_parts(ptr, token, stride, part0, part1, inside, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    rows = ptr + token.to(tl.int64)[:, None] * stride
    d0 = tl.arange(0, D0)
    tl.store(rows + d0[None, :], part0.to(ptr.dtype.element_ty), mask=inside[:, None] & (d0 < D)[None, :])
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        tl.store(rows + d1[None, :], part1.to(ptr.dtype.element_ty), mask=inside[:, None] & (d1 < D)[None, :])


@triton.jit
def zeros_parts(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    part0 = tl.zeros((ROWS, D0), tl.float32)
    part1 = part0
    if D1 > 0:
        part1 = tl.zeros((ROWS, D1), tl.float32)
    return part0, part1


@triton.jit
def accumulate(a, b0, b1, acc0, acc1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b over both parts of the head: [rows of a, D0] and [rows of a, D1], in fp32."""
    acc0 = tl.dot(a, b0, acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def products(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both parts of the head: [rows of a, rows of b], in fp32."""
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def which_kept(mask_ptr, token, T, HAS_MASK: tl.constexpr):
    """Which keys count: inside the sequence, and kept by the key mask."""
    inside = token < T
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    return inside
