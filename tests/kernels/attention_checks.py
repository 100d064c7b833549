"""Inputs for soft-capped attention, and how right its results are: shared by the tests of every backend."""

import torch
from torch import Tensor

from locfast.kernels.softcap_attention import softcap_attention

from .attention_reference import rounding_only_what_must_be
from .tolerance import assert_close_as_dtype_allows, assert_no_lost_gradient

CAP = 5.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("output", "q.grad", "k.grad", "v.grad", "bias.grad")


def make_inputs(batch, heads, tokens, head_dim, dtype, cap, device, seed=0, keys=None) -> list[Tensor]:
    """q, k, v and the output's gradient; logits (scale D^-0.5) spread to twice the cap: both sides of its knee."""
    generator = torch.Generator().manual_seed(seed)
    spread = 1.0 if cap is None else min(cap, 50.0) ** 0.5

    def draw(length: int, size: float) -> Tensor:
        return (size * torch.randn(batch, heads, length, head_dim, generator=generator)).to(dtype).to(device)

    q, k, v = draw(tokens, spread), draw(keys or tokens, spread), draw(keys or tokens, 1.0)
    return [q, k, v, draw(tokens, 1.0)]


def make_bias(*shape: int, device="cpu", dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


def make_key_mask(batch: int, keys: int, device="cpu") -> Tensor:
    """About two thirds of the keys; none at all for the last image."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(2)) < 0.66
    mask[-1] = False
    return mask.to(device)


def gradients(function, inputs, grad):
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [t for t in inputs if t is not None], grad)]


def check(inputs, grad, softcap, backend, bias=None, scale=None, key_mask=None):
    """Output and gradients as right as the dtype allows; see tolerance.py."""
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale

    def op(name):
        return lambda q, k, v, b: softcap_attention(
            q, k, v, softcap=softcap, scale=scale, bias=b, key_mask=key_mask, backend=name
        )

    found = gradients(op(backend), [*inputs, bias], grad)
    same = gradients(
        lambda q, k, v, b: rounding_only_what_must_be(q, k, v, softcap, scale, b, key_mask), [*inputs, bias], grad
    )
    wide = [None if t is None else t.double() for t in (*inputs, bias)]
    truth = gradients(op("reference"), wide, grad.double())
    for name, a, b, c in zip(NAMES, found, same, truth, strict=False):
        assert_close_as_dtype_allows(a, b, c, name)
        assert_no_lost_gradient(a, c, name)
