"""What an op's triton.py tells about its kernels: every compiled form in use, for a look at the machine code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compiled form of one Triton kernel: what a launch would specialise it to."""

    name: str
    """As listed, e.g. "softcap_attention forward bf16 D 64"."""
    kernel: Any
    """The @triton.jit function."""
    types: dict[str, str]
    """Type of every argument that is not a constant: "*bf16", "i32", "fp32"."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Values of the tl.constexpr arguments."""
    unaligned: tuple[str, ...] = ()
    """Integer arguments that are no multiples of 16 (as Triton sees them: sizes such as 577); pointers all are."""
    num_warps: int = 4
    num_stages: int = 3
    dtype: str = "fp32"
    """Of the data: "bf16", "fp16" or "fp32"."""
    head_dim: int | None = None
    """For attention and contrastive kernels: the width of their products."""
    needs_tensor_cores: bool = False
    """A form that must not spill and must run its products on tensor cores on sm_90 (the default of its op)."""
