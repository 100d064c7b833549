"""Small kernels whose machine code is known beforehand: one that is right, and one for each thing that can be wrong."""

import os
import sys

import triton
import triton.language as tl

from locfast.kernels._variants import Variant, variant_of_launch


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, out_ptr, K, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, SIZE):
        a = tl.load(a_ptr + row * K + k + column)
        b = tl.load(b_ptr + (k + row) * SIZE + column)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out_ptr + row * SIZE + column, total.to(out_ptr.dtype.element_ty))


@triton.jit
def _broken_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), nowhere_defined)  # noqa: F821


class _Crash:
    """Stands for a kernel on which LLVM aborts the process."""

    @property
    def fn(self) -> object:
        print("LLVM ERROR: Cannot select: intrinsic", file=sys.stderr, flush=True)
        os._exit(134)


def variants() -> list[Variant]:
    return [
        _matmul("sample matmul bf16", "bf16", needs_tensor_cores=True),
        # too few warps for wgmma: mma.sync, whose sums alone fill the 64 registers
        _matmul("sample spilling bf16", "bf16", needs_tensor_cores=True, num_warps=2, options={"maxnreg": 64}),
        _matmul("sample without tensor cores fp32", "fp32"),
        Variant("sample crash", _Crash(), {}),
        Variant("sample broken", _broken_kernel, {"x_ptr": "*fp32"}, {"SIZE": 128}),
        Variant("sample mistyped", _broken_kernel, {"y_ptr": "*fp32"}, {"SIZE": 128}),
    ]


def _matmul(name: str, dtype: str, **rest: object) -> Variant:
    types = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), f"*{dtype}")
    constants = {"SIZE": 64, "PRECISION": "ieee"}
    return variant_of_launch(name, _matmul_kernel, types, {"K": 128}, constants, dtype=dtype, head_dim=64, **rest)
