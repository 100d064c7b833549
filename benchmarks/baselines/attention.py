"""What a user would take instead of softcap_attention: each peer is a function of (q, k, v, softcap, scale).

q, k, v and the result are [B, H, T, D], as for locfast's op. A peer's `load` imports what it needs, and raises where it
is not installed or does not load. Peers without a cap are yardsticks: they compute less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from baselines._library import library, torch_compile
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[..., Tensor]
"""(q, k, v, softcap, scale) -> out."""


@dataclass(frozen=True)
class Peer:
    """One row of the table."""

    name: str
    load: Callable[[], Attention]
    capped: bool = True
    compiled: bool = False
    """Whether torch.compile makes it: seconds for every new shape."""
    needs: str = "any"
    """The device type it runs on: "cuda", or any."""
    exact: str = ""
    """For an approximation: the peer it approximates. Results equal to that one's mean that it did not."""


def eager(q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float) -> Tensor:
    """The equation as MaskEmbed's public code runs it: T x T logits and weights in the inputs' dtype, all stored."""
    logits = softcap * torch.tanh((q * scale) @ k.transpose(-2, -1) / softcap)
    return torch.softmax(logits, dim=-1) @ v


def load_eager() -> Attention:
    return eager


def load_compiled_eager() -> Attention:
    return torch_compile(eager)


def load_flex(approximate: bool = False, mode: str | None = None) -> Attention:
    """flex_attention under torch.compile, the cap as its score_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    tanh = _approximate_tanh() if approximate else torch.tanh
    compiled = torch_compile(flex_attention, mode)

    @functools.cache
    def cap(softcap: float) -> Callable[..., Tensor]:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return softcap * tanh(score / softcap)

        return score_mod

    def flex(q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float) -> Tensor:
        return compiled(q, k, v, score_mod=cap(softcap), scale=scale)

    return flex


def load_sdpa(backend: SDPBackend) -> Attention:
    """PyTorch's own attention by one of its backends, without a cap."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return sdpa


def load_xformers() -> Attention:
    """xformers' memory-efficient attention, without a cap: it has none."""
    ops = library("xformers.ops")

    def xformers(q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float) -> Tensor:
        return ops.memory_efficient_attention(*_heads_inside(q, k, v), scale=scale).transpose(1, 2)

    return xformers


def load_flash_attention(module: str) -> Attention:
    """flash_attn_func of flash-attn 2 (flash_attn), 3 (flash_attn_interface) or 4 (flash_attn.cute)."""
    function = library(module).flash_attn_func

    def flash(q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float) -> Tensor:
        out = function(*_heads_inside(q, k, v), softmax_scale=scale, softcap=softcap)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # 3 and 4 gave the log-sum-exp too, once

    return flash


def _heads_inside(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, T, D] -> [B, T, H, D], where these libraries want their heads; nothing is copied."""
    return tuple(t.transpose(1, 2) for t in tensors)


@functools.cache
def _approximate_tanh() -> Callable[[Tensor], Tensor]:
    """tanh of one instruction on an NVIDIA GPU, as an op that torch.compile lowers to it inside a score_mod.

    Inductor has no setting for it, so the op brings its own lowering, through the hooks that attention-gym's
    softcapping uses. Unlike there the op itself carries derivative and batching rule: with an autograd.Function whose
    batching rule is torch.tanh, the exact function ends up in the kernel wherever that rule is taken.
    """
    from torch._inductor.lowering import make_pointwise, register_lowering
    from torch._inductor.virtualized import ops

    @torch.library.custom_op("locfast_benchmarks::tanh_approx", mutates_args=())
    def tanh(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @tanh.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    def differentiate(ctx: Any, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return grad * (1 - result * result)

    tanh.register_autograd(differentiate, setup_context=setup_context)
    tanh.register_vmap(lambda info, in_dims, x: (tanh(x), in_dims[0]))

    def one_instruction(x: Any) -> Any:
        return ops.inline_asm_elementwise(x, asm="tanh.approx.f32 $0, $1;", dtype=torch.float32)

    register_lowering(torch.ops.locfast_benchmarks.tanh_approx)(make_pointwise(one_instruction))
    return tanh


def _sdpa(name: str, backend: SDPBackend, needs: str = "any") -> Peer:
    return Peer(f"sdpa {name}, no cap", functools.partial(load_sdpa, backend), capped=False, needs=needs)


PEERS = (
    Peer("flex exact", load_flex, compiled=True),
    _sdpa("flash", SDPBackend.FLASH_ATTENTION),
    _sdpa("cudnn", SDPBackend.CUDNN_ATTENTION, needs="cuda"),
    Peer("flash-attn 2", functools.partial(load_flash_attention, "flash_attn"), needs="cuda"),
    Peer("flash-attn 3", functools.partial(load_flash_attention, "flash_attn_interface"), needs="cuda"),
    Peer("flash-attn 4", functools.partial(load_flash_attention, "flash_attn.cute"), needs="cuda"),
    Peer("flex approx", functools.partial(load_flex, True), compiled=True, exact="flex exact"),
    _sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION, needs="cuda"),
    Peer("xformers, no cap", load_xformers, capped=False, needs="cuda"),
    Peer("eager", load_eager),
    Peer("eager compiled", load_compiled_eager, compiled=True),
    _sdpa("math", SDPBackend.MATH),
)
"""In order of worth: those that the targets name come first."""

AUTOTUNED = (
    Peer("flex exact, autotuned", functools.partial(load_flex, mode="max-autotune-no-cudagraphs"), compiled=True),
)
"""Minutes of compilation for every shape: by --autotune only."""
