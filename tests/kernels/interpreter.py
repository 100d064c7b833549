"""What Triton's CPU interpreter gets wrong or leaves out, put right for tests.

It truncates fp32 to bf16 and to fp8 where a GPU rounds to nearest even, multiplies the raw bit patterns of bf16
operands, sums fp32 products in BLAS's order (another for a tile than for its transpose, where a GPU sums both in
sequence), rounds a fused product and sum twice, and runs no inline assembly. Kernels are never changed to please the
interpreter, so the corrections live here.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from locfast.kernels._backend import interpreting
from locfast.kernels.region_contrastive_loss import block, tiles

SMALL = tiles.Tiles(64, 64, 32, 4, 2)
"""Tiles of the region losses there, a hundred of whose rows are then several."""
TANH = "tanh.approx.f32 $0, $1;"
# Two values, $3 and $4, into the lower and the upper half of $0 (cvt puts its first operand above), and wide again.
ROUND_BF16 = """{
    .reg .b32 t;
    cvt.rn.bf16x2.f32 $0, $4, $3;
    shl.b32 t, $0, 16;
    mov.b32 $1, t;
    and.b32 t, $0, 0xffff0000;
    mov.b32 $2, t;
}"""
ROUND_FP16 = """{
    .reg .b16 low, high;
    cvt.rn.f16x2.f32 $0, $4, $3;
    mov.b32 {low, high}, $0;
    cvt.f32.f16 $1, low;
    cvt.f32.f16 $2, high;
}"""


def mend_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the interpreter the hardware's bf16 casts and products, and its tanh. Does nothing where it does not run."""
    if not interpreting() or find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return data.view(np.uint16).astype(np.uint32) << 16
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
        if source == tl.float32 and target == tl.float8e4nv:
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn)
            return rounded.view(torch.uint8).numpy()
        return convert(data, source, target, rounding)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(sum_in_sequence(a.data, b.data, d.data), d.dtype.scalar)

        def wide(operand):
            if operand.dtype.scalar != tl.bfloat16:
                return operand
            return interpreter.TensorHandle(widen_bf16(operand.data), tl.float32)

        return dot(self, wide(a), wide(b), d, input_precision, max_num_imprecise_acc)

    def create_fma(self, x, y, z):
        """fp64 holds the product of two fp32: one rounding, as on a GPU."""
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)

    def create_inline_asm(self, inline_asm, constraints, values, kind, is_pure, pack):
        data = values[0].data
        if inline_asm == TANH:
            results = [interpreter.TensorHandle(hardware_tanh(data), tl.float32)]
        elif inline_asm == ROUND_BF16:
            rounded = convert_float(data, tl.float32, tl.bfloat16, None)
            results = [
                interpreter.TensorHandle(rounded, tl.bfloat16),
                interpreter.TensorHandle(widen_bf16(rounded), tl.float32),
            ]
        else:
            assert inline_asm == ROUND_FP16, f"no emulation of {inline_asm!r}"
            rounded = data.astype(np.float16)
            results = [
                interpreter.TensorHandle(rounded, tl.float16),
                interpreter.TensorHandle(rounded.astype(np.float32), tl.float32),
            ]
        return SimpleNamespace(get_result=results.__getitem__)

    for table in (tiles.HALF, tiles.FP32):
        for kernel in table:
            monkeypatch.setitem(table, kernel, SMALL)
    monkeypatch.setitem(tiles.ROWS, "to a program", SMALL.rows)  # it takes its time for every program
    monkeypatch.setattr(block, "TILE", (SMALL.columns, 2 * SMALL.width))
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)


def sum_in_sequence(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a b in fp32, one fused product and sum after the other."""
    a, b = a.astype(np.float64), b.astype(np.float64)  # which hold a product of two fp32
    for k in range(a.shape[1]):
        total = (a[:, k : k + 1] * b[k : k + 1] + total).astype(np.float32)
    return total


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bit patterns."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def hardware_tanh(x: np.ndarray) -> np.ndarray:
    """tanh.approx.f32 is good to a relative error of 2^-11 (PTX ISA): tanh rounded to 11 bits of mantissa."""
    mantissa, exponent = np.frexp(np.tanh(x.astype(np.float64)))
    return np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent).astype(np.float32)
