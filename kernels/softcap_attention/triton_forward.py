"""Forward of soft-capped attention in Triton: out and the log-sum-exp of every row."""

import triton
import triton.language as tl

from .triton_parts import LN2, accumulate, load_parts, products, squash, store_parts, which_kept, zeros_parts


@triton.jit
def _forward_keys(
    acc0, acc1, total, highest, q0, q1, k_ptr, v_ptr, mask_ptr, start, TK, k_stride, v_stride, scale, cap, shift,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, TANH: tl.constexpr,
    ONLINE: tl.constexpr, HAS_MASK: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add BLOCK keys from `start` to a block of rows' output, sum of weights and highest logit."""
    key = start + tl.arange(0, BLOCK)
    kept = which_kept(mask_ptr, key, TK, HAS_MASK)
    k0, k1 = load_parts(k_ptr, key, k_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    v0, v1 = load_parts(v_ptr, key, v_stride, kept, CHECK or HAS_MASK, D, D0, D1)
    logits = squash(products(q0, q1, k0, k1, D1, PRECISION), scale, TANH)
    if ONLINE:
        logits = logits * cap
        if CHECK or HAS_MASK:
            logits = tl.where(kept[None, :], logits, -float("inf"))
        above = tl.maximum(highest, tl.max(logits, 1))
        finite = tl.where(above == -float("inf"), 0.0, above)  # a row that has seen no key yet
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(highest - finite)
        total = total * shrink
        acc0 = acc0 * shrink[:, None]
        if D1 > 0:
            acc1 = acc1 * shrink[:, None]
        highest = above
    else:
        weights = tl.exp2(logits * cap - shift)
        if CHECK or HAS_MASK:
            weights = tl.where(kept[None, :], weights, 0.0)
    total += tl.sum(weights, 1)
    acc0, acc1 = accumulate(weights.to(v0.dtype), v0, v1, acc0, acc1, D1, PRECISION)
    return acc0, acc1, total, highest


@triton.jit
def _forward_kernel(
    q_ptr,  # [B, H, TQ, D] by its strides; k, v [B, H, TK, D] likewise
    k_ptr,
    v_ptr,
    mask_ptr,  # [B, TK] uint8
    out_ptr,  # [B, TQ, H, D]
    lse_ptr,  # [B, H, TQ] fp32, or fp64 for fp32 inputs
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
    scale,  # of q k^T, over the cap: the argument of tanh. Without a cap times log2(e)
    cap,  # times log2(e): weights are powers of two. Without a cap 1
    shift,  # times log2(e)
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    TANH: tl.constexpr,
    ONLINE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(TQ, BLOCK_Q)
    pair = tl.program_id(0) // blocks
    batch, head = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    q_token, k_token, v_token = q_token * ALIGN, k_token * ALIGN, v_token * ALIGN
    q_ptr += (batch * q_batch + head * q_head) * ALIGN
    k_ptr += (batch * k_batch + head * k_head) * ALIGN
    v_ptr += (batch * v_batch + head * v_head) * ALIGN
    out_ptr += (batch * out_batch + head * out_head) * ALIGN
    mask_ptr += batch * TK
    row = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = row < TQ
    q0, q1 = load_parts(q_ptr, row, q_token, inside, True, D, D0, D1)
    acc0, acc1 = zeros_parts(BLOCK_Q, D0, D1)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    highest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    full = TK // BLOCK_K * BLOCK_K
    for start in range(0, full, BLOCK_K):
        acc0, acc1, total, highest = _forward_keys(
            acc0, acc1, total, highest, q0, q1, k_ptr, v_ptr, mask_ptr, start, TK, k_token, v_token, scale, cap, shift,
            D, D0, D1, BLOCK_K, TANH, ONLINE, HAS_MASK, False, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        acc0, acc1, total, highest = _forward_keys(
            acc0, acc1, total, highest, q0, q1, k_ptr, v_ptr, mask_ptr, full, TK, k_token, v_token, scale, cap, shift,
            D, D0, D1, TAIL, TANH, ONLINE, HAS_MASK, True, PRECISION,
        )  # fmt: skip
    seen = total > 0.0  # a row whose keys are all hidden: zeros, and a log-sum-exp that gives its weights zero again
    total = tl.where(seen, total, 1.0)
    share = 1.0 / total[:, None]
    store_parts(out_ptr, row, out_token * ALIGN, acc0 * share, acc1 * share, inside, D, D0, D1)
    base = tl.zeros((BLOCK_Q,), tl.float32) + shift
    if ONLINE:
        base = highest
    kind: tl.constexpr = lse_ptr.dtype.element_ty
    lse = tl.where(seen, (base.to(kind) + tl.log2(total).to(kind)) * LN2, float("inf"))
    tl.store(lse_ptr + pair.to(tl.int64) * TQ + row, lse, mask=inside)
