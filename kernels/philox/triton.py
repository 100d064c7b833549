"""Philox-4x32-10 for Triton kernels: the same words as the reference, drawn where they are needed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._variants import Variant, variant_of_launch

MASK32: tl.constexpr = tl.constexpr(0xFFFFFFFF)


@triton.jit
def philox_words(counter0, counter1, counter2, counter3, key0, key1):
    """Four uint32 words for the 128-bit counter and 64-bit key, given as integers in 0 .. 2^32 - 1."""
    return tl.philox(
        (key1.to(tl.uint64) << 32) | key0.to(tl.uint64),
        counter0.to(tl.uint32),
        counter1.to(tl.uint32),
        counter2.to(tl.uint32),
        counter3.to(tl.uint32),
    )


@triton.jit(do_not_specialize=["key0", "key1"])  # a key is a seed: one compiled form for all, 1 among them
def _philox_kernel(
    counter_ptr,  # [M, 4] int64
    out_ptr,  # [M, 4] int64
    key0,
    key1,
    M,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < M
    c0 = tl.load(counter_ptr + row * 4, mask=inside, other=0)
    c1 = tl.load(counter_ptr + row * 4 + 1, mask=inside, other=0)
    c2 = tl.load(counter_ptr + row * 4 + 2, mask=inside, other=0)
    c3 = tl.load(counter_ptr + row * 4 + 3, mask=inside, other=0)
    w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, key0.to(tl.int64), key1.to(tl.int64))
    tl.store(out_ptr + row * 4, w0.to(tl.int64), mask=inside)
    tl.store(out_ptr + row * 4 + 1, w1.to(tl.int64), mask=inside)
    tl.store(out_ptr + row * 4 + 2, w2.to(tl.int64), mask=inside)
    tl.store(out_ptr + row * 4 + 3, w3.to(tl.int64), mask=inside)


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Four random 32-bit words for each counter: [..., 4] int64, as the reference gives them."""
    counter = counter.contiguous()
    out = torch.empty_like(counter)
    rows = counter.numel() // 4
    if rows:
        with torch.cuda.device_of(counter):  # Triton launches on the current device, whichever holds the tensors
            _philox_kernel[(triton.cdiv(rows, 256),)](counter, out, *key, rows, BLOCK=256)
    return out


def variants() -> list[Variant]:
    """A key of two words, the second beyond 2^31, and the 256 samples of a batch."""
    types = {"counter_ptr": "*i64", "out_ptr": "*i64"}
    integers = {"key0": 12345, "key1": 2**32 - 1, "M": 256}
    return [variant_of_launch("philox int64", _philox_kernel, types, integers, {"BLOCK": 256}, dtype="int64")]
