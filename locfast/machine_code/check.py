"""What CI holds kernels to: the default forms of attention and contrastive kernels on sm_90."""

from __future__ import annotations

from collections.abc import Sequence

from locfast.machine_code.listing import Row

ARCH = 90
MAX_HEAD_DIM = 128


def is_checked(row: Row) -> bool:
    """A default form in bf16 or fp16 with products at most 128 wide, on sm_90."""
    narrow = row.head_dim is not None and row.head_dim <= MAX_HEAD_DIM
    return row.needs_tensor_cores and row.arch == ARCH and row.dtype in ("bf16", "fp16") and narrow


def offences(rows: Sequence[Row]) -> list[str]:
    """What is wrong with the rows that are checked, a line each: spills, products without tensor cores, no code."""
    return [f"{row.kernel}: {fault}" for row in rows if is_checked(row) for fault in _faults(row)]


def _faults(row: Row) -> list[str]:
    if row.failed is not None:
        return [row.failed]
    faults = []
    if row.spill_bytes:
        faults.append(f"spills {row.spill_bytes} bytes a thread")
    if not row.tensor_core:
        faults.append("has no tensor-core instructions")
    elif row.products_on_fma:
        faults.append(f"runs {row.products_on_fma} of {row.products} products without tensor cores")
    return faults
