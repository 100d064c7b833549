"""Compiled forms of the Triton kernels, for a look at the machine code: of one rank that keeps the filter's bits."""

from __future__ import annotations

from typing import Any

import torch

from .._variants import Variant, variant_of_launch
from .block import weight_unit
from .tiles import of_architecture
from .triton_backward import _backward_kernel
from .triton_constants import GROUP, SUMS, products, row_constants
from .triton_filter import _filter_kernel
from .triton_forward import _forward_kernel
from .triton_rows import _finish_kernel, _prepare_kernel
from .triton_sums import _inverse_kernel, _log2_kernel, _settle_kernel


def variants() -> list[Variant]:
    """The forms for E 768 on one rank, with the filter's bits kept, in every dtype, before sm_90 and from there on."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    pairs = [
        _pairs_variant(name, short, dtype, major)
        for short, dtype in dtypes.items()
        for name in _PAIR_KERNELS
        for major in (8, 9)
    ]
    rows = [_rows_variant(name, short) for short in dtypes for name in _ROW_KERNELS]
    return pairs + rows + [_sums_variant(name) for name in _SUM_KERNELS]


_PAIR_KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "filter": (_filter_kernel, {"SYMMETRIC": True}),
    "forward": (_forward_kernel, {"FORM": "shifted"}),
    "forward online": (_forward_kernel, {"FORM": "online"}),
    "forward sigmoid": (_forward_kernel, {"FORM": "sigmoid"}),
    "backward": (_backward_kernel, {"SIGMOID": False}),
    "backward sigmoid": (_backward_kernel, {"SIGMOID": True}),
}
_ROW_KERNELS = {"prepare": _prepare_kernel, "finish": _finish_kernel}
_SUM_KERNELS = {"settle": _settle_kernel, "log2": _log2_kernel, "inverse": _inverse_kernel}
_SIZES = {"first_row": 0, "panel": 32768, "rows": 32768, "columns": 32768, "segments": 4, "programs": 132}
_WIDTH = 768


def _pairs_variant(name: str, short: str, dtype: torch.dtype, major: int) -> Variant:
    kernel, form = _PAIR_KERNELS[name]
    cut = of_architecture(name.replace("forward ", "").replace("backward sigmoid", "backward"), dtype, major)
    constants: dict[str, Any] = {"OWN": True, **form, **products(torch.empty(0, _WIDTH, dtype=dtype), cut)}
    if kernel is not _filter_kernel:
        constants |= {"HAS_BITS": True, "FROM_CUBLAS": False}
    if kernel is not _forward_kernel:
        constants["GROUP"] = GROUP
    if kernel is _backward_kernel:
        constants["UNIT"] = weight_unit(dtype)
    types = _types(kernel, short) | {"rate_ptr": "*fp32"}
    types = {key: kind for key, kind in types.items() if key in kernel.arg_names}
    if kernel is _filter_kernel:
        types["threshold"] = "fp32"
    for argument, rows in zip(kernel.arg_names[:2], (cut.rows, cut.columns), strict=True):
        types[argument] = f"tensordesc<{short}[{rows}, {cut.width}]>"
    return variant_of_launch(
        f"region_contrastive_loss {name} {short}",
        kernel,
        types,
        {key: value for key, value in _SIZES.items() if key in kernel.arg_names},
        constants,
        dtype=short,
        head_dim=cut.width,
        needs_tensor_cores=short != "fp32" and name in ("filter", "forward", "backward"),
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        architectures=(0, 89) if major < 9 else (90, 119),
    )


def _rows_variant(name: str, short: str) -> Variant:
    kernel = _ROW_KERNELS[name]
    constants = row_constants(_WIDTH, _WIDTH)
    num_warps = constants.pop("num_warps")
    integers = {key: 32768 for key in ("rows", "padded") if key in kernel.arg_names}
    return variant_of_launch(
        f"region_contrastive_loss {name} {short}",
        kernel,
        _types(kernel, short),
        integers,
        constants,
        dtype=short,
        num_warps=num_warps,
    )


def _sums_variant(name: str) -> Variant:
    kernel = _SUM_KERNELS[name]
    integers = {key: value for key, value in _SIZES.items() if key in kernel.arg_names}
    types = _types(kernel, "fp32")
    return variant_of_launch(f"region_contrastive_loss {name}", kernel, types, integers, {"BLOCK": SUMS}, num_warps=2)


def _types(kernel: Any, short: str) -> dict[str, str]:
    kinds = {"valid_ptr": "*u8", "dropped_ptr": "*i32", "wanted_ptr": "*i32", "apart_ptr": "*i32"}
    kinds |= {"again_ptr": "*i32", "rate_ptr": "*fp64", "row_log2_ptr": "*fp64", "column_log2_ptr": "*fp64"}
    kinds |= {"row_valid_ptr": "*u8", "column_valid_ptr": "*u8", "padded_valid_ptr": "*u8"}
    data = {"regions_ptr", "texts_ptr", "region_units_ptr", "text_units_ptr"}
    data |= {"weights_ptr", "x_ptr", "x_grad_ptr", "partner_ptr"}
    return {
        name: kinds.get(name, f"*{short}" if name in data else "*fp32")
        for name in kernel.arg_names
        if name.endswith("_ptr")
    }
