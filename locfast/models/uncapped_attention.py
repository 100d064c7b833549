"""Attention without a cap: PyTorch's scaled_dot_product_attention, or flash-attn by name.

flash-attn is taken from where its user installed it and named in no metadata: several packages share its name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from locfast.errors import UserError

Implementation = Literal["sdpa", "flash-attn"]
"""The names that `--maskembed.uncapped-attention` takes."""


class Version(NamedTuple):
    """A generation of flash-attn, each a module of its own."""

    name: str
    module: str
    runs_on: Callable[[int, int], bool]
    """(major compute capability, head dim) -> whether it has forward and backward kernels there."""


VERSIONS = (
    Version("flash-attn 4", "flash_attn.cute", lambda major, dim: major == 9 or (major in (10, 11) and dim <= 128)),
    Version("flash-attn 3", "flash_attn_interface", lambda major, dim: major == 9),
    Version("flash-attn 2", "flash_attn", lambda major, dim: major >= 8),
)
"""The newest first. flash-attn 4 runs on compute capability 8 too, but has no backward pass there."""


def uncapped_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, implementation: Implementation = "sdpa"
) -> Tensor:
    """softmax(q k^T * scale + bias) v. q, k, v [B, H, T, D], bias [1 or B, H, T, T] -> [B, H, T, D].

    `sdpa` leaves the choice of a kernel to PyTorch. `flash-attn` raises UserError where it cannot run, see
    `find_flash_attn`.
    """
    if implementation == "flash-attn":
        return _flash_attn(q, k, v, scale, bias)
    if implementation != "sdpa":
        raise UserError(f"attention without a cap by {implementation!r} was asked for. Type sdpa or flash-attn.")
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype), scale=scale)


def find_flash_attn(
    device: torch.device, dtype: torch.dtype, head_dim: int, has_bias: bool = False
) -> Callable[..., Any]:
    """The newest installed flash-attn's flash_attn_func for such tensors. Raises UserError where there is none."""
    instead = ""
    if has_bias:
        why = "it adds no bias to the logits, and this model has one for relative positions"
    elif head_dim > 256 or head_dim % 8:
        why = f"it takes head dims of 8, 16, ... 256, and this model has {head_dim}"
    elif device.type != "cuda":
        why = f"it runs on CUDA devices, and the tensors are on {device}"
    elif dtype not in (torch.float16, torch.bfloat16):
        why = f"it computes in fp16 and bf16, and the tensors are {str(dtype).removeprefix('torch.')}"
        instead = ", or --precision bf16"
    else:
        found = [(version, *_import(version.module)) for version in VERSIONS]
        if all(function is None for _, function, _ in found):
            why = "; ".join(error for _, _, error in found)
            instead = ", or install flash-attn as its own page says"
        else:
            major = torch.cuda.get_device_capability(device)[0]
            for version, function, _ in found:
                if function is not None and version.runs_on(major, head_dim):
                    return function
            installed = " and ".join(version.name for version, function, _ in found if function is not None)
            why = f"{installed} has no kernels for compute capability {major}.x at head dim {head_dim}"
    raise UserError(
        f"flash-attn was asked for, but {why}. Type --maskembed.uncapped-attention sdpa for PyTorch's own "
        f"attention{instead}."
    )


@torch.compiler.disable  # flash-attn 4 starts kernels of its own compiler, which torch.compile cannot trace
def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """[B, H, T, D] each -> [B, H, T, D]; flash-attn wants heads behind tokens, which is how a projection lays them."""
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    function = find_flash_attn(q.device, q.dtype, q.shape[-1], bias is not None)
    out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale)
    out = out[0] if isinstance(out, tuple) else out  # flash-attn 4 and early builds of 3 hand out the log-sum-exp too
    return out.transpose(1, 2)


@functools.cache
def _import(module: str) -> tuple[Callable[..., Any] | None, str]:
    """A module's flash_attn_func, or None and why."""
    try:
        return importlib.import_module(module).flash_attn_func, ""
    except Exception as error:  # a build for another torch raises OSError, ImportError, AttributeError, ...
        return None, f"import {module} fails ({type(error).__name__}: {error})"
