"""Inputs of an attention benchmark, and how right an implementation is on them, against fp64 on two of the images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import _harness  # noqa: F401  (puts the checkout on the path)
import torch
from torch import Tensor

from locfast.kernels.softcap_attention import softcap_attention
from tests.kernels.attention_reference import rounding_only_what_must_be
from tests.kernels.tolerance import assert_close_as_dtype_allows, assert_no_lost_gradient

NAMES = ("output", "q.grad", "k.grad", "v.grad")
WRONG = 0.25
"""Relative L2 error from which on a peer computes something else, and is not timed."""
UNCAPPED_EPS = 4
"""Peers without a cap are yardsticks: theirs may be this many machine epsilons of the dtype (1e-4 at least)."""

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """B images, H heads, T tokens, head dim D."""

    batch: int
    heads: int
    tokens: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Of the forward by the usual count; the backward's is 2.5 times that, whatever is executed."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.head_dim

    @property
    def letters(self) -> dict[str, int]:
        return {"B": self.batch, "H": self.heads, "T": self.tokens, "D": self.head_dim}


class Inputs:
    """q, k, v as slices of one packed projection [B, T, 3, H, D], as a ViT makes them, and the output's gradient.

    `deviation`: of the logits, at the default scale. The cap's two sides are met by logits of deviation `softcap`, a
    trained ViT's rarely reach a cap of 30: so the results are checked on the one kind and timed on the other.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, deviation: float, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)
        make = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
        packed = make(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
        packed[:, :, :2] *= deviation**0.5
        self.plain = tuple(t.transpose(1, 2) for t in packed.unbind(2))
        self.leaves = tuple(t.detach().requires_grad_() for t in self.plain)
        self.grad = make(shape.batch, shape.tokens, shape.heads, shape.head_dim).transpose(1, 2)

    def forward(self, call: Call) -> Tensor:
        with torch.no_grad():
            return call(*self.plain)

    def forward_and_backward(self, call: Call) -> tuple[Tensor, ...]:
        out = call(*self.leaves)
        return (out.detach(), *torch.autograd.grad(out, self.leaves, self.grad))

    def backward_alone(self, call: Call) -> Callable[[], object]:
        """Runs the backward of one forward again and again; the forward runs at the first call."""
        graph = functools.cache(lambda: call(*self.leaves))
        return lambda: torch.autograd.grad(graph(), self.leaves, self.grad, retain_graph=True)


class Judge:
    """Knows the right results at one shape, for the first and the last image; all images are computed."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, softcap: float, scale: float):
        self.inputs = Inputs(shape, dtype, device, deviation=softcap)
        self.softcap, self.scale = softcap, scale
        self.images = sorted({0, shape.batch - 1})
        self._known: dict[bool, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def ours(self, call: Call, backward: bool) -> None:
        """The rule that the kernels' tests hold them to. Raises AssertionError."""
        for name, found, same, truth in self._compare(call, backward, capped=True):
            assert_close_as_dtype_allows(found, same, truth, name)
            if name != "output":
                assert_no_lost_gradient(found, truth, name)

    def peer(self, call: Call, backward: bool, capped: bool) -> str:
        """What to note of a peer's accuracy; raises AssertionError where it computes something else."""
        note, worst = "", 0.0
        for name, found, same, truth in self._compare(call, backward, capped):
            error, forced = relative_error(found, truth), relative_error(same, truth)
            assert error <= WRONG, f"{name}: relative L2 error {error:.2g}"
            if error > worst and not self._is_exact_enough(found, same, truth, capped):
                note = f"less exact: relative L2 error {error:.1e} in {name}, rounding alone costs {forced:.1e}"
                worst = error
        return note

    def _is_exact_enough(self, found: Tensor, same: Tensor, truth: Tensor, capped: bool) -> bool:
        if not capped:
            return relative_error(found, truth) <= max(UNCAPPED_EPS * torch.finfo(found.dtype).eps, 1e-4)
        try:
            assert_close_as_dtype_allows(found, same, truth, "")
        except AssertionError:
            return False
        return True

    def _compare(self, call: Call, backward: bool, capped: bool) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        found = self.inputs.forward_and_backward(call) if backward else (self.inputs.forward(call),)
        if capped not in self._known:
            self._known[capped] = self._right(capped)
        same, truth = self._known[capped]
        here = [t[self.images] for t in found]
        return list(zip(NAMES, here, same, truth, strict=False))

    def _right(self, capped: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What rounding alone gives, and the truth in fp64."""
        softcap = self.softcap if capped else None

        def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return softcap_attention(q, k, v, softcap=softcap, scale=self.scale, backend="reference")

        def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return rounding_only_what_must_be(q, k, v, softcap, self.scale)

        leaves = [t[self.images] for t in self.inputs.plain]
        grad = self.inputs.grad[self.images]
        return _with_gradients(rounded, leaves, grad), _with_gradients(truth, [t.double() for t in leaves], grad)


def _with_gradients(call: Call, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (t.requires_grad_() for t in leaves)
    out = call(q, k, v)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype)))


def relative_error(found: Tensor, truth: Tensor) -> float:
    """L2 norm of the error over that of the truth; infinite where something is not finite."""
    error = ((found.double() - truth.double()).norm() / truth.double().norm()).item()
    return error if error == error else float("inf")
