"""Backward of soft-capped attention in Triton for keys and values; no atomics, so no two runs differ."""

import triton
import triton.language as tl

from .triton_backward import or_zero_for_one_key, second_part, unpack, weigh
from .triton_parts import accumulate, load_parts, store_parts, which_kept, zeros_parts


@triton.jit
def _backward_kv_queries(
    k_acc0, k_acc1, v_acc0, v_acc1, k0, k1, v0, v1, grad_ptr, q_ptr, lse_ptr, pair_ptr, start, TQ, grad_stride,
    q_stride, scale, cap, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    TANH: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK queries from `start` give to the gradients of a block of keys and values."""
    row = start + tl.arange(0, BLOCK)
    inside = row < TQ
    q0, q1 = load_parts(q_ptr, row, q_stride, inside, CHECK, D, D0, D1)
    g0, g1 = load_parts(grad_ptr, row, grad_stride, inside, CHECK, D, D0, D1)
    # A row past the end: a log-sum-exp of infinity and a delta of zero.
    pair = tl.load(pair_ptr + row, mask=inside, other=0x7F800000) if CHECK else tl.load(pair_ptr + row)
    lse, delta = unpack(pair)
    lse_rest = lse
    if q0.dtype == tl.float32:
        lse_rest = second_part(tl.load(lse_ptr + row, mask=inside, other=float("inf")), lse)
    weights, above, slope = weigh(
        k0, k1, q0, q1, v0, v1, g0, g1, lse[None, :], lse_rest[None, :], delta[None, :], scale, cap, D1, TANH, PRECISION
    )
    v_acc0, v_acc1 = accumulate(weights.to(g0.dtype), g0, g1, v_acc0, v_acc1, D1, PRECISION)
    k_acc0, k_acc1 = accumulate((weights * above * slope).to(q0.dtype), q0, q1, k_acc0, k_acc1, D1, PRECISION)
    return k_acc0, k_acc1, v_acc0, v_acc1


@triton.jit
def _backward_kv_rows(
    first, grad_ptr, q_ptr, k_ptr, v_ptr, k_grad_ptr, v_grad_ptr, lse_ptr, pair_ptr, mask_ptr, TQ, TK, grad_stride,
    q_stride, k_stride, v_stride, out_stride, scale, cap, logit_scale, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, ROWS: tl.constexpr, WALK: tl.constexpr, WALK_TAIL: tl.constexpr, TANH: tl.constexpr,
    HAS_MASK: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS keys and values from `first` of one head; CHECK where some may lie beyond the last."""
    key = first + tl.arange(0, ROWS)
    kept = which_kept(mask_ptr, key, TK, HAS_MASK)
    k0, k1 = load_parts(k_ptr, key, k_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    v0, v1 = load_parts(v_ptr, key, v_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    k_acc0, k_acc1 = zeros_parts(ROWS, D0, D1)
    v_acc0, v_acc1 = zeros_parts(ROWS, D0, D1)
    full = TQ // WALK * WALK
    if WALK_TAIL > 0:
        k_acc0, k_acc1, v_acc0, v_acc1 = _backward_kv_queries(
            k_acc0, k_acc1, v_acc0, v_acc1, k0, k1, v0, v1, grad_ptr, q_ptr, lse_ptr, pair_ptr, full, TQ, grad_stride,
            q_stride, scale, cap, D, D0, D1, WALK_TAIL, TANH, True, PRECISION,
        )  # fmt: skip
    for start in range(0, full, WALK):
        k_acc0, k_acc1, v_acc0, v_acc1 = _backward_kv_queries(
            k_acc0, k_acc1, v_acc0, v_acc1, k0, k1, v0, v1, grad_ptr, q_ptr, lse_ptr, pair_ptr, start, TQ, grad_stride,
            q_stride, scale, cap, D, D0, D1, WALK, TANH, False, PRECISION,
        )  # fmt: skip
    if HAS_MASK:
        logit_scale = or_zero_for_one_key(logit_scale, mask_ptr, TK)
        # Hidden keys were loaded as zeros: their rows hold what zeros would get, and are selected away.
        k_acc0, v_acc0 = tl.where(kept[:, None], k_acc0, 0.0), tl.where(kept[:, None], v_acc0, 0.0)
        if D1 > 0:
            k_acc1, v_acc1 = tl.where(kept[:, None], k_acc1, 0.0), tl.where(kept[:, None], v_acc1, 0.0)
    # Rows counted from `first` again: their numbers would take registers all through the loop.
    row = tl.arange(0, ROWS)
    inside = row < TK - first
    k_grad_ptr += first.to(tl.int64) * out_stride
    v_grad_ptr += first.to(tl.int64) * out_stride
    store_parts(k_grad_ptr, row, out_stride, k_acc0 * logit_scale, k_acc1 * logit_scale, inside, D, D0, D1)
    store_parts(v_grad_ptr, row, out_stride, v_acc0, v_acc1, inside, D, D0, D1)


@triton.jit
def _backward_kv_kernel(
    grad_ptr,  # [B, H, TQ, D] by its strides
    q_ptr,
    k_ptr,  # [B, H, TK, D] by their strides
    v_ptr,
    k_grad_ptr,  # [B, TK, H, D]
    v_grad_ptr,
    lse_ptr,  # [B, H, TQ] fp32 in powers of two, or fp64 in powers of e for fp32 inputs
    pair_ptr,  # [B, H, TQ] int64: lse and delta in fp32
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
    WALK: tl.constexpr,
    OWN: tl.constexpr,
    OWN_TAIL: tl.constexpr,  # keys of the last block where it is smaller than the others
    WALK_TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    TANH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(TK, OWN)
    pair = tl.program_id(0) // blocks
    batch, head = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    grad_token, q_token = grad_token * ALIGN, q_token * ALIGN
    k_token, v_token, out_token = k_token * ALIGN, v_token * ALIGN, out_token * ALIGN
    grad_ptr += (batch * grad_batch + head * grad_head) * ALIGN
    q_ptr += (batch * q_batch + head * q_head) * ALIGN
    k_ptr += (batch * k_batch + head * k_head) * ALIGN
    v_ptr += (batch * v_batch + head * v_head) * ALIGN
    k_grad_ptr += (batch * out_batch + head * out_head) * ALIGN
    v_grad_ptr += (batch * out_batch + head * out_head) * ALIGN
    lse_ptr += pair.to(tl.int64) * TQ
    pair_ptr += pair.to(tl.int64) * TQ
    mask_ptr += batch * TK
    first = tl.program_id(0) % blocks * OWN
    if OWN_TAIL > 0 and first + OWN > TK:
        _backward_kv_rows(
            first, grad_ptr, q_ptr, k_ptr, v_ptr, k_grad_ptr, v_grad_ptr, lse_ptr, pair_ptr, mask_ptr, TQ, TK,
            grad_token, q_token, k_token, v_token, out_token, scale, cap, logit_scale, D, D0, D1, OWN_TAIL, WALK,
            WALK_TAIL, TANH, HAS_MASK, True, PRECISION,
        )  # fmt: skip
    else:
        _backward_kv_rows(
            first, grad_ptr, q_ptr, k_ptr, v_ptr, k_grad_ptr, v_grad_ptr, lse_ptr, pair_ptr, mask_ptr, TQ, TK,
            grad_token, q_token, k_token, v_token, out_token, scale, cap, logit_scale, D, D0, D1, OWN, WALK,
            WALK_TAIL, TANH, HAS_MASK, OWN_TAIL == 0, PRECISION,
        )  # fmt: skip
