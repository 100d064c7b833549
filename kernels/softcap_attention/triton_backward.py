"""What both kernels of the backward share: weights of a tile and parts of their gradients, facts of rows in packs."""

import triton
import triton.language as tl

from .triton_parts import exponential, products, squash


@triton.jit
def sum_of_products(g0, g1, out0, out1, D1: tl.constexpr):
    """grad * out, summed over each row's head."""
    delta = tl.sum(g0.to(tl.float32) * out0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(g1.to(tl.float32) * out1.to(tl.float32), 1)
    return delta


@triton.jit
def second_part(lse, first):
    """What fp32 lost of a log-sum-exp in fp64."""
    return tl.where(lse < float("inf"), lse - first.to(tl.float64), 0.0).to(tl.float32)


@triton.jit
def pack(low, high):
    """Two fp32 as the halves of an int64."""
    low, high = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def unpack(pair):
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def weigh(
    a0, a1, b0, b1, g0, g1, h0, h1, lse, lse_rest, delta, scale, cap,
    D1: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights p of a tile of scores a b^T, g h^T - delta, and the cap's slope: the scores' gradient is their product.

    Rows may be queries or keys; lse and delta come ready to broadcast along the other side.
    """
    x = squash(products(a0, a1, b0, b1, D1, PRECISION), scale, TANH)
    exponent = tl.fma(x, cap, -lse)  # one rounding, of a small number
    if a0.dtype == tl.float32:
        exponent -= lse_rest
    weights = exponential(exponent, a0.dtype == tl.float32)
    above = products(g0, g1, h0, h1, D1, PRECISION) - delta
    # The slope is taken before any masking, and from the tanh that is there: one is computed, not two.
    slope = tl.full(x.shape, 1.0, tl.float32) if TANH == "none" else 1.0 - x * x
    return weights, above, slope


@triton.jit
def or_zero_for_one_key(logit_scale, mask_ptr, TK):
    """One kept key has weight 1 whatever its score: then q and k get no gradient, not even a rounding error."""
    count = tl.zeros((128,), tl.int32)
    for start in range(0, TK, 128):
        key = start + tl.arange(0, 128)
        count += (tl.load(mask_ptr + key, mask=key < TK, other=0) != 0).to(tl.int32)
    return tl.where(tl.sum(count, 0) == 1, 0.0, logit_scale)
