"""Matrix products whose sums are kept in fp32: by cuBLAS on tensor cores on a GPU, exactly on a CPU."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums of products are kept: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor, add_to: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] in fp32 (fp64 for fp64), into `add_to` [M, N] where given, and that returned."""
    with ieee_fp32():
        if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
            if add_to is None:
                return torch.mm(a, b, out_dtype=torch.float32)
            return torch.addmm(add_to, a, b, out_dtype=torch.float32, out=add_to)
        a, b = a.to(wide(a.dtype)), b.to(wide(a.dtype))
        return a @ b if add_to is None else torch.addmm(add_to, a, b, out=add_to)


@contextlib.contextmanager
def ieee_fp32() -> Iterator[None]:
    """No TF32 in here, whatever the program allows elsewhere: its cosines are good to three digits."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
