"""Backward of soft-capped attention in Triton for queries: their gradient, and delta for the kernel of keys."""

import triton
import triton.language as tl

from .triton_backward import or_zero_for_one_key, pack, second_part, sum_of_products, weigh
from .triton_parts import REST_SCALE, accumulate, load_parts, store_parts, which_kept, zeros_parts


@triton.jit
def _backward_q_keys(
    acc0, acc1, q0, q1, g0, g1, lse, lse_rest, delta, k_ptr, v_ptr, mask_ptr, start, TK, k_stride, v_stride, scale, cap,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, TANH: tl.constexpr,
    HAS_MASK: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK keys from `start` give to the gradient of a block of queries."""
    key = start + tl.arange(0, BLOCK)
    kept = which_kept(mask_ptr, key, TK, HAS_MASK)
    k0, k1 = load_parts(k_ptr, key, k_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    v0, v1 = load_parts(v_ptr, key, v_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    weights, above, slope = weigh(
        q0, q1, k0, k1, g0, g1, v0, v1, lse[:, None], lse_rest[:, None], delta[:, None], scale, cap, D1, TANH, PRECISION
    )
    gradients = weights * above * slope
    if CHECK or HAS_MASK:
        gradients = tl.where(kept[None, :], gradients, 0.0)
    return accumulate(gradients.to(k0.dtype), k0, k1, acc0, acc1, D1, PRECISION)


@triton.jit
def _backward_q_rows(
    first, grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rest_ptr, q_grad_ptr, lse_ptr, pair_ptr, mask_ptr, TQ, TK,
    grad_stride, q_stride, k_stride, v_stride, out_stride, scale, cap, logit_scale, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, ROWS: tl.constexpr, WALK: tl.constexpr, WALK_TAIL: tl.constexpr, TANH: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_REST: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient and delta of ROWS queries from `first` of one head; CHECK where some may lie beyond the last."""
    row = first + tl.arange(0, ROWS)
    inside = row < TQ
    q0, q1 = load_parts(q_ptr, row, q_stride, inside, CHECK, D, D0, D1)
    g0, g1 = load_parts(grad_ptr, row, grad_stride, inside, CHECK, D, D0, D1)
    out0, out1 = load_parts(out_ptr, row, out_stride, inside, CHECK, D, D0, D1)
    delta = sum_of_products(g0, g1, out0, out1, D1)
    if HAS_REST:
        # `out` was rounded, which the gradients of peaked rows would show: small differences of large products.
        rest0, rest1 = load_parts(rest_ptr, row, out_stride, inside, CHECK, D, D0, D1)
        lacking = sum_of_products(g0, g1, rest0, rest1, D1)
        delta += lacking / REST_SCALE if g0.dtype == tl.float16 else lacking
    precise = tl.load(lse_ptr + row, mask=inside, other=float("inf"))
    lse = precise.to(tl.float32)
    lse_rest = second_part(precise, lse) if precise.dtype == tl.float64 else lse
    tl.store(pair_ptr + row, pack(lse, delta), mask=inside)
    acc0, acc1 = zeros_parts(ROWS, D0, D1)
    full = TK // WALK * WALK
    if WALK_TAIL > 0:
        acc0, acc1 = _backward_q_keys(
            acc0, acc1, q0, q1, g0, g1, lse, lse_rest, delta, k_ptr, v_ptr, mask_ptr, full, TK, k_stride, v_stride,
            scale, cap, D, D0, D1, WALK_TAIL, TANH, HAS_MASK, True, PRECISION,
        )  # fmt: skip
    for start in range(0, full, WALK):
        acc0, acc1 = _backward_q_keys(
            acc0, acc1, q0, q1, g0, g1, lse, lse_rest, delta, k_ptr, v_ptr, mask_ptr, start, TK, k_stride, v_stride,
            scale, cap, D, D0, D1, WALK, TANH, HAS_MASK, False, PRECISION,
        )  # fmt: skip
    if HAS_MASK:
        logit_scale = or_zero_for_one_key(logit_scale, mask_ptr, TK)
    # Rows counted from `first` again: their numbers would take registers all through the loop.
    row = tl.arange(0, ROWS)
    q_grad_ptr += first.to(tl.int64) * out_stride
    store_parts(q_grad_ptr, row, out_stride, acc0 * logit_scale, acc1 * logit_scale, row < TQ - first, D, D0, D1)


@triton.jit
def _backward_q_kernel(
    grad_ptr,  # [B, H, TQ, D] by its strides
    q_ptr,
    k_ptr,  # [B, H, TK, D] by their strides
    v_ptr,
    out_ptr,  # [B, TQ, H, D], and likewise what its rounding lost and the gradient of q
    rest_ptr,
    q_grad_ptr,
    lse_ptr,  # [B, H, TQ] fp32 in powers of two, or fp64 in powers of e for fp32 inputs
    pair_ptr,  # [B, H, TQ] int64: lse and delta (sum of grad * out) in fp32, written here for the kernel of k and v
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
    OWN: tl.constexpr,
    OWN_TAIL: tl.constexpr,  # rows of the last block where it is smaller than the others
    WALK: tl.constexpr,
    WALK_TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    TANH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(TQ, OWN)
    pair = tl.program_id(0) // blocks
    batch, head = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    grad_token, q_token = grad_token * ALIGN, q_token * ALIGN
    k_token, v_token, out_token = k_token * ALIGN, v_token * ALIGN, out_token * ALIGN
    grad_ptr += (batch * grad_batch + head * grad_head) * ALIGN
    q_ptr += (batch * q_batch + head * q_head) * ALIGN
    k_ptr += (batch * k_batch + head * k_head) * ALIGN
    v_ptr += (batch * v_batch + head * v_head) * ALIGN
    out_ptr += (batch * out_batch + head * out_head) * ALIGN
    rest_ptr += (batch * out_batch + head * out_head) * ALIGN
    q_grad_ptr += (batch * out_batch + head * out_head) * ALIGN
    mask_ptr += batch * TK
    lse_ptr += pair.to(tl.int64) * TQ
    pair_ptr += pair.to(tl.int64) * TQ
    first = tl.program_id(0) % blocks * OWN
    if OWN_TAIL > 0 and first + OWN > TQ:
        _backward_q_rows(
            first, grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rest_ptr, q_grad_ptr, lse_ptr, pair_ptr, mask_ptr, TQ, TK,
            grad_token, q_token, k_token, v_token, out_token, scale, cap, logit_scale, D, D0, D1, OWN_TAIL, WALK,
            WALK_TAIL, TANH, HAS_MASK, HAS_REST, True, PRECISION,
        )  # fmt: skip
    else:
        _backward_q_rows(
            first, grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, rest_ptr, q_grad_ptr, lse_ptr, pair_ptr, mask_ptr, TQ, TK,
            grad_token, q_token, k_token, v_token, out_token, scale, cap, logit_scale, D, D0, D1, OWN, WALK,
            WALK_TAIL, TANH, HAS_MASK, HAS_REST, OWN_TAIL == 0, PRECISION,
        )  # fmt: skip
