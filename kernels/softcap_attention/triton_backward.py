"""Backward of soft-capped attention in Triton: one kernel for queries, one for keys and values; no atomics."""

import triton
import triton.language as tl

from .triton_parts import LOG2E, accumulate, load_parts, products, squash, store_parts, which_kept, zeros_parts


@triton.jit
def sum_of_products(g0, g1, out0, out1, D1: tl.constexpr):
    """Delta: grad * out, summed over each row's head."""
    delta = tl.sum(g0.to(tl.float32) * out0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(g1.to(tl.float32) * out1.to(tl.float32), 1)
    return delta


@triton.jit
def load_lse(lse_ptr, row, inside, CHECK: tl.constexpr):
    """Log-sum-exp in powers of two and in two parts, of which the second is zero but for fp32 inputs."""
    no_weight = float("inf")
    lse = tl.load(lse_ptr + row, mask=inside, other=no_weight) if CHECK else tl.load(lse_ptr + row)
    lse *= LOG2E
    first = lse.to(tl.float32)
    second = tl.zeros_like(first)
    if lse.dtype == tl.float64:
        finite = tl.where(lse < float("inf"), lse, 0.0)
        second = (finite - finite.to(tl.float32).to(tl.float64)).to(tl.float32)
    return first, second


@triton.jit
def weigh(
    a0, a1, b0, b1, g0, g1, h0, h1, lse, lse_rest, delta, scale, cap,
    D1: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights p of a tile of scores a b^T, g h^T - delta, and the cap's slope: the scores' gradient is their product.

    Rows may be queries or keys; lse (in powers of two) and delta come ready to broadcast along the other side.
    """
    x = squash(products(a0, a1, b0, b1, D1, PRECISION), scale, TANH)
    exponent = x * cap - lse
    if a0.dtype == tl.float32:
        exponent -= lse_rest
    weights = tl.exp2(exponent)
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


@triton.jit
def _backward_q_keys(
    acc0, acc1, slope0, slope1, lacking, q0, q1, g0, g1, lse, lse_rest, delta, k_ptr, v_ptr, mask_ptr, start, TK,
    k_stride, v_stride, scale, cap, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    TANH: tl.constexpr, CORRECT: tl.constexpr, HAS_MASK: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK keys from `start` give to a block of queries: gradients, what delta lacks, and weighted slopes."""
    key = start + tl.arange(0, BLOCK)
    kept = which_kept(mask_ptr, key, TK, HAS_MASK)
    k0, k1 = load_parts(k_ptr, key, k_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    v0, v1 = load_parts(v_ptr, key, v_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    weights, above, slope = weigh(
        q0, q1, k0, k1, g0, g1, v0, v1, lse[:, None], lse_rest[:, None], delta[:, None], scale, cap, D1, TANH, PRECISION
    )
    if CHECK or HAS_MASK:
        weights = tl.where(kept[None, :], weights, 0.0)
    above *= weights
    if CORRECT:
        lacking += tl.sum(above, 1)
        slope0, slope1 = accumulate((weights * slope).to(k0.dtype), k0, k1, slope0, slope1, D1, PRECISION)
    acc0, acc1 = accumulate((above * slope).to(k0.dtype), k0, k1, acc0, acc1, D1, PRECISION)
    return acc0, acc1, slope0, slope1, lacking


@triton.jit
def _backward_q_kernel(
    grad_ptr,  # [B, H, TQ, D] by its strides
    q_ptr,
    k_ptr,  # [B, H, TK, D] by their strides
    v_ptr,
    out_ptr,  # [B, TQ, H, D], and the gradient of q likewise
    q_grad_ptr,
    lse_ptr,  # [B, H, TQ] fp32, or fp64 for fp32 inputs
    delta_ptr,  # [B, H, TQ] fp32: sum of grad * out, written here for the kernel of k and v
    mask_ptr,  # [B, TK] uint8
    grad_batch,
    grad_head,
    grad_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    H,
    TQ,
    TK,
    scale,
    cap,
    logit_scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    TANH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(TQ, BLOCK_Q)
    pair = tl.program_id(0) // blocks
    batch, head = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    k_token, v_token, out_token = k_token * ALIGN, v_token * ALIGN, out_token * ALIGN
    grad_ptr += (batch * grad_batch + head * grad_head) * ALIGN
    q_ptr += (batch * q_batch + head * q_head) * ALIGN
    k_ptr += (batch * k_batch + head * k_head) * ALIGN
    v_ptr += (batch * v_batch + head * v_head) * ALIGN
    out_ptr += (batch * out_batch + head * out_head) * ALIGN
    q_grad_ptr += (batch * out_batch + head * out_head) * ALIGN
    mask_ptr += batch * TK
    lse_ptr += pair.to(tl.int64) * TQ
    delta_ptr += pair.to(tl.int64) * TQ

    row = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = row < TQ
    q0, q1 = load_parts(q_ptr, row, q_token * ALIGN, inside, True, D, D0, D1)
    g0, g1 = load_parts(grad_ptr, row, grad_token * ALIGN, inside, True, D, D0, D1)
    out0, out1 = load_parts(out_ptr, row, out_token, inside, True, D, D0, D1)
    delta = sum_of_products(g0, g1, out0, out1, D1)
    lse, lse_rest = load_lse(lse_ptr, row, inside, True)
    acc0, acc1 = zeros_parts(BLOCK_Q, D0, D1)
    # `out` was rounded, which the gradients of peaked rows would show: they are small differences of large products.
    # Weights sum to 1, so what delta lacks is the mean of all that lies above it; it enters by the weighted slopes.
    slope0, slope1 = zeros_parts(BLOCK_Q, D0, D1)
    lacking = tl.zeros((BLOCK_Q,), tl.float32)
    CORRECT: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    full = TK // BLOCK_K * BLOCK_K
    for start in range(0, full, BLOCK_K):
        acc0, acc1, slope0, slope1, lacking = _backward_q_keys(
            acc0, acc1, slope0, slope1, lacking, q0, q1, g0, g1, lse, lse_rest, delta, k_ptr, v_ptr, mask_ptr,
            start, TK, k_token, v_token, scale, cap, D, D0, D1, BLOCK_K, TANH, CORRECT, HAS_MASK, False, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        acc0, acc1, slope0, slope1, lacking = _backward_q_keys(
            acc0, acc1, slope0, slope1, lacking, q0, q1, g0, g1, lse, lse_rest, delta, k_ptr, v_ptr, mask_ptr,
            full, TK, k_token, v_token, scale, cap, D, D0, D1, TAIL, TANH, CORRECT, HAS_MASK, True, PRECISION,
        )  # fmt: skip
    acc0, acc1 = acc0 - lacking[:, None] * slope0, acc1 - lacking[:, None] * slope1
    tl.store(delta_ptr + row, delta + lacking, mask=inside)
    if HAS_MASK:
        logit_scale = or_zero_for_one_key(logit_scale, mask_ptr, TK)
    store_parts(q_grad_ptr, row, out_token, acc0 * logit_scale, acc1 * logit_scale, inside, D, D0, D1)


@triton.jit
def _backward_kv_queries(
    k_acc0, k_acc1, v_acc0, v_acc1, k0, k1, v0, v1, grad_ptr, q_ptr, lse_ptr, delta_ptr, start, TQ, grad_stride,
    q_stride, scale, cap, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    TANH: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK queries from `start` give to the gradients of a block of keys and values."""
    row = start + tl.arange(0, BLOCK)
    inside = row < TQ
    q0, q1 = load_parts(q_ptr, row, q_stride, inside, CHECK, D, D0, D1)
    g0, g1 = load_parts(grad_ptr, row, grad_stride, inside, CHECK, D, D0, D1)
    lse, lse_rest = load_lse(lse_ptr, row, inside, CHECK)
    delta = tl.load(delta_ptr + row, mask=inside, other=0.0) if CHECK else tl.load(delta_ptr + row)
    weights, above, slope = weigh(
        k0, k1, q0, q1, v0, v1, g0, g1, lse[None, :], lse_rest[None, :], delta[None, :], scale, cap, D1, TANH, PRECISION
    )
    v_acc0, v_acc1 = accumulate(weights.to(g0.dtype), g0, g1, v_acc0, v_acc1, D1, PRECISION)
    k_acc0, k_acc1 = accumulate((weights * above * slope).to(q0.dtype), q0, q1, k_acc0, k_acc1, D1, PRECISION)
    return k_acc0, k_acc1, v_acc0, v_acc1


@triton.jit
def _backward_kv_kernel(
    grad_ptr,  # [B, H, TQ, D] by its strides
    q_ptr,
    k_ptr,  # [B, H, TK, D] by their strides
    v_ptr,
    k_grad_ptr,  # [B, TK, H, D]
    v_grad_ptr,
    lse_ptr,  # [B, H, TQ] fp32, or fp64 for fp32 inputs
    delta_ptr,  # [B, H, TQ] fp32
    mask_ptr,  # [B, TK] uint8
    grad_batch,
    grad_head,
    grad_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    H,
    TQ,
    TK,
    scale,
    cap,
    logit_scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    TANH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(TK, BLOCK_K)
    pair = tl.program_id(0) // blocks
    batch, head = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    grad_token, q_token, out_token = grad_token * ALIGN, q_token * ALIGN, out_token * ALIGN
    grad_ptr += (batch * grad_batch + head * grad_head) * ALIGN
    q_ptr += (batch * q_batch + head * q_head) * ALIGN
    k_ptr += (batch * k_batch + head * k_head) * ALIGN
    v_ptr += (batch * v_batch + head * v_head) * ALIGN
    k_grad_ptr += (batch * out_batch + head * out_head) * ALIGN
    v_grad_ptr += (batch * out_batch + head * out_head) * ALIGN
    lse_ptr += pair.to(tl.int64) * TQ
    delta_ptr += pair.to(tl.int64) * TQ

    key = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = key < TK
    kept = which_kept(mask_ptr + batch * TK, key, TK, HAS_MASK)
    k0, k1 = load_parts(k_ptr, key, k_token * ALIGN, kept, True, D, D0, D1)
    v0, v1 = load_parts(v_ptr, key, v_token * ALIGN, kept, True, D, D0, D1)
    k_acc0, k_acc1 = zeros_parts(BLOCK_K, D0, D1)
    v_acc0, v_acc1 = zeros_parts(BLOCK_K, D0, D1)
    full = TQ // BLOCK_Q * BLOCK_Q
    for start in range(0, full, BLOCK_Q):
        k_acc0, k_acc1, v_acc0, v_acc1 = _backward_kv_queries(
            k_acc0, k_acc1, v_acc0, v_acc1, k0, k1, v0, v1, grad_ptr, q_ptr, lse_ptr, delta_ptr, start, TQ, grad_token,
            q_token, scale, cap, D, D0, D1, BLOCK_Q, TANH, False, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        k_acc0, k_acc1, v_acc0, v_acc1 = _backward_kv_queries(
            k_acc0, k_acc1, v_acc0, v_acc1, k0, k1, v0, v1, grad_ptr, q_ptr, lse_ptr, delta_ptr, full, TQ, grad_token,
            q_token, scale, cap, D, D0, D1, TAIL, TANH, True, PRECISION,
        )  # fmt: skip
    if HAS_MASK:
        logit_scale = or_zero_for_one_key(logit_scale, mask_ptr + batch * TK, TK)
    # Hidden keys were loaded as zeros: their rows hold what zeros would get, and are selected away.
    k_acc0, v_acc0 = tl.where(kept[:, None], k_acc0 * logit_scale, 0.0), tl.where(kept[:, None], v_acc0, 0.0)
    if D1 > 0:
        k_acc1, v_acc1 = tl.where(kept[:, None], k_acc1 * logit_scale, 0.0), tl.where(kept[:, None], v_acc1, 0.0)
    store_parts(k_grad_ptr, key, out_token, k_acc0, k_acc1, inside, D, D0, D1)
    store_parts(v_grad_ptr, key, out_token, v_acc0, v_acc1, inside, D, D0, D1)
