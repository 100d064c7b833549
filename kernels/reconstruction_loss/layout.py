"""Tensors [B, V, T, C] as the kernels walk over their tokens."""

from torch import Tensor


def merged(*tensors: Tensor) -> list[Tensor]:
    """The same tokens in the same order, axes merged where the strides of all allow: [B * V * T, 1, 1, C] at best.

    Kernels find a token by dividing by the second and third size, which costs nothing where those are 1. Rows come out
    contiguous: only tensors whose last stride is not 1 are copied.
    """
    rows = [t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in tensors]
    sizes, strides = list(rows[0].shape[:3]), [list(t.stride()[:3]) for t in rows]
    for axis in (1, 0):  # the two inner ones first
        outer, inner = sizes[axis], sizes[axis + 1]
        if inner == 1 or outer == 1 or all(s[axis] == inner * s[axis + 1] for s in strides):
            sizes[axis : axis + 2] = [outer * inner]
            for s in strides:
                s[axis : axis + 2] = [s[axis] if inner == 1 else s[axis + 1]]
    while len(sizes) < 3:
        sizes.insert(1, 1)
        for s in strides:
            s.insert(1, 0)
    return [t.as_strided([*sizes, t.shape[3]], [*s, 1], t.storage_offset()) for t, s in zip(rows, strides, strict=True)]
