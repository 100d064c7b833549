"""What an op's triton.py tells about its kernels: every compiled form in use, for a look at the machine code.

An op lists them in `variants() -> list[Variant]`; `python -m locfast.inspect` compiles them.
"""

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
    """Values of the tl.constexpr arguments, and of integer arguments that are 1: Triton makes those constants too."""
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
    architectures: tuple[int, int] = (0, 1000)
    """The first and last for which a launch takes this form: (90, 1000) from Hopper on."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other compile options of the launch, e.g. {"maxnreg": 168, "enable_fp_fusion": True}."""


def variant_of_launch(
    name: str, kernel: Any, types: dict[str, str], integers: dict[str, int], constants: dict[str, Any], **rest: Any
) -> Variant:
    """The form that a launch with these integer arguments compiles; `types` for pointers and floats, `rest` as Variant.

    Triton makes an integer that is 1 a constant, tells the compiler of multiples of 16, and takes i64 beyond 32 bits.
    """
    ones = {key: 1 for key, value in integers.items() if value == 1}
    others = {key: value for key, value in integers.items() if value != 1}
    kinds = {key: "i32" if -(2**31) <= value < 2**31 else "i64" for key, value in others.items()}
    unaligned = tuple(key for key, value in others.items() if value % 16)
    return Variant(name, kernel, types | kinds, constants | ones, unaligned, **rest)
