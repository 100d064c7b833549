"""Forward of soft-capped attention in Triton: out and the log-sum-exp of every row."""

import triton
import triton.language as tl

from .triton_parts import (
    LN2,
    REST_SCALE,
    accumulate,
    exponential,
    load_parts,
    products,
    round_and_widen,
    squash,
    store_parts,
    which_kept,
    zeros_parts,
)


@triton.jit
def _forward_keys(
    acc0, acc1, total, divisor, highest, q0, q1, k_ptr, v_ptr, mask_ptr, start, TK, k_stride, v_stride, scale, cap,
    shift, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, TANH: tl.constexpr,
    ONLINE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_REST: tl.constexpr, CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add BLOCK keys from `start` to a block of rows' output, sums of weights and highest logit."""
    OF_E: tl.constexpr = q0.dtype == tl.float32
    key = start + tl.arange(0, BLOCK)
    kept = which_kept(mask_ptr, key, TK, HAS_MASK)
    k0, k1 = load_parts(k_ptr, key, k_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    v0, v1 = load_parts(v_ptr, key, v_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    logits = squash(products(q0, q1, k0, k1, D1, PRECISION), scale, TANH)
    if ONLINE:
        if CHECK or HAS_MASK:
            logits = tl.where(kept[None, :], logits, -float("inf"))
        above = tl.maximum(highest, tl.max(logits, 1))
        finite = tl.where(above == -float("inf"), 0.0, above)  # a row that has seen no key yet
        # The difference first: it is exact where it matters, and its product with the cap is small.
        weights = exponential((logits - finite[:, None]) * cap, OF_E)
        shrink = exponential((highest - finite) * cap, OF_E)
        total = total * shrink
        divisor = divisor * shrink
        acc0 = acc0 * shrink[:, None]
        if D1 > 0:
            acc1 = acc1 * shrink[:, None]
        highest = above
    else:
        weights = exponential(logits * cap - shift, OF_E)
        if CHECK or HAS_MASK:
            weights = tl.where(kept[None, :], weights, 0.0)
    total += tl.sum(weights, 1)
    if HAS_REST:  # rows are divided by the sum of what the products see: of one heavy weight its own rounding cancels
        rounded, widened = round_and_widen(weights, v0.dtype)
        divisor += tl.sum(widened, 1)
    else:
        rounded = weights.to(v0.dtype)
    acc0, acc1 = accumulate(rounded, v0, v1, acc0, acc1, D1, PRECISION)
    return acc0, acc1, total, divisor, highest


@triton.jit
def _forward_rows(
    first, q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, rest_ptr, lse_ptr, out_start, lse_start, TQ, TK, q_stride, k_stride,
    v_stride, out_stride, scale, cap, shift, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr,
    WALK: tl.constexpr, WALK_TAIL: tl.constexpr, TANH: tl.constexpr, ONLINE: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_REST: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of ROWS queries from `first` of one head; CHECK where some may lie beyond the last."""
    row = first + tl.arange(0, ROWS)
    inside = row < TQ
    q0, q1 = load_parts(q_ptr, row, q_stride, inside, CHECK, D, D0, D1)
    acc0, acc1 = zeros_parts(ROWS, D0, D1)
    total = tl.zeros((ROWS,), tl.float32)
    divisor = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    full = TK // WALK * WALK
    for start in range(0, full, WALK):
        acc0, acc1, total, divisor, highest = _forward_keys(
            acc0, acc1, total, divisor, highest, q0, q1, k_ptr, v_ptr, mask_ptr, start, TK, k_stride, v_stride, scale,
            cap, shift, D, D0, D1, WALK, TANH, ONLINE, HAS_MASK, HAS_REST, False, PRECISION,
        )  # fmt: skip
    if WALK_TAIL > 0:
        acc0, acc1, total, divisor, highest = _forward_keys(
            acc0, acc1, total, divisor, highest, q0, q1, k_ptr, v_ptr, mask_ptr, full, TK, k_stride, v_stride, scale,
            cap, shift, D, D0, D1, WALK_TAIL, TANH, ONLINE, HAS_MASK, HAS_REST, True, PRECISION,
        )  # fmt: skip
    # Rows counted from `first` again: their numbers would take registers all through the loop.
    row = tl.arange(0, ROWS)
    inside = row < TQ - first
    out_ptr += out_start
    rest_ptr += out_start
    lse_ptr += lse_start
    # A row whose keys are all hidden: zeros, and a log-sum-exp that gives its weights zero again. NaN is no such row.
    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    share = tl.div_rn(1.0, tl.where(seen, divisor, 1.0) if HAS_REST else total)[:, None]
    out0, out1 = acc0 * share, acc1 * share
    store_parts(out_ptr, row, out_stride, out0, out1, inside, D, D0, D1)
    if HAS_REST:
        kind: tl.constexpr = out_ptr.dtype.element_ty
        rest0, rest1 = out0 - out0.to(kind).to(tl.float32), out1 - out1.to(kind).to(tl.float32)
        if kind == tl.float16:
            rest0, rest1 = rest0 * REST_SCALE, rest1 * REST_SCALE
        store_parts(rest_ptr, row, out_stride, rest0, rest1, inside, D, D0, D1)
    precise: tl.constexpr = lse_ptr.dtype.element_ty
    base = highest.to(precise) * cap if ONLINE else tl.zeros((ROWS,), precise) + shift
    log = tl.log2(total.to(precise))
    if precise == tl.float64:
        log *= LN2
    lse = tl.where(seen, base + log, float("inf"))
    tl.store(lse_ptr + row, lse, mask=inside)


@triton.jit
def _forward_kernel(
    q_ptr,  # [B, H, TQ, D] by its strides; k, v [B, H, TK, D] likewise
    k_ptr,
    v_ptr,
    mask_ptr,  # [B, TK] uint8
    out_ptr,  # [B, TQ, H, D]
    rest_ptr,  # likewise: what the rounding of the output lost
    lse_ptr,  # [B, H, TQ] fp32 in powers of two, or fp64 in powers of e for fp32 inputs
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
    scale,  # of q k^T, over the cap: the argument of tanh. Without a cap times log2(e) but for fp32
    cap,  # times log2(e) but for fp32: weights are powers of two. Without a cap 1
    shift,  # times log2(e)
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    OWN: tl.constexpr,
    OWN_TAIL: tl.constexpr,  # rows of the last block where it is smaller than the others
    WALK: tl.constexpr,
    WALK_TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    TANH: tl.constexpr,
    ONLINE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(TQ, OWN)
    pair = tl.program_id(0) // blocks
    batch, head = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    q_token, k_token, v_token, out_token = q_token * ALIGN, k_token * ALIGN, v_token * ALIGN, out_token * ALIGN
    q_ptr += (batch * q_batch + head * q_head) * ALIGN
    k_ptr += (batch * k_batch + head * k_head) * ALIGN
    v_ptr += (batch * v_batch + head * v_head) * ALIGN
    mask_ptr += batch * TK
    first = tl.program_id(0) % blocks * OWN
    out_start = (batch * out_batch + head * out_head) * ALIGN + first.to(tl.int64) * out_token
    lse_start = pair.to(tl.int64) * TQ + first
    if OWN_TAIL > 0 and first + OWN > TQ:
        _forward_rows(
            first, q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, rest_ptr, lse_ptr, out_start, lse_start, TQ, TK, q_token,
            k_token, v_token, out_token, scale, cap, shift, D, D0, D1, OWN_TAIL, WALK, WALK_TAIL, TANH, ONLINE,
            HAS_MASK, HAS_REST, True, PRECISION,
        )  # fmt: skip
    else:
        _forward_rows(
            first, q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, rest_ptr, lse_ptr, out_start, lse_start, TQ, TK, q_token,
            k_token, v_token, out_token, scale, cap, shift, D, D0, D1, OWN, WALK, WALK_TAIL, TANH, ONLINE, HAS_MASK,
            HAS_REST, OWN_TAIL == 0, PRECISION,
        )  # fmt: skip
