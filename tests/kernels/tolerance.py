"""How right is right: a kernel's error, held against the error that its dtype forces on anybody.

`truth` is the reference in fp64 on the same (already rounded) inputs, `same` is the reference that rounds only what the
hardware must round. A kernel may err twice as much as `same`, plus one unit in the last place of the largest value.
"""

import torch
from torch import Tensor


def assert_close_as_dtype_allows(
    found: Tensor, same: Tensor, truth: Tensor, name: str, computed_in: torch.dtype | None = None
) -> None:
    """Compare largest errors and relative L2 errors; see the module's docstring.

    computed_in: the dtype whose unit counts, where results are kept in a wider one (autocast's fp32 gradients).
    """
    assert found.shape == truth.shape, f"{name}: shape {tuple(found.shape)}, wanted {tuple(truth.shape)}"
    assert found.dtype == same.dtype, f"{name}: {found.dtype}, wanted {same.dtype}"
    eps = torch.finfo(computed_in or found.dtype).eps
    found, same, truth = found.double().cpu(), same.double().cpu(), truth.double().cpu()
    largest = truth.abs().max()
    ulp = eps * 2.0 ** torch.floor(torch.log2(largest)) if largest > 0 else 0.0
    error, allowed = (found - truth).abs().max(), 2 * (same - truth).abs().max() + ulp
    assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"
    norm = truth.norm().clamp_min(torch.finfo(torch.float64).tiny)
    error, allowed = (found - truth).norm() / norm, 2 * (same - truth).norm() / norm + eps
    assert error <= allowed, f"{name}: relative L2 error {error:.3g}, allowed {allowed:.3g}"


def assert_no_lost_gradient(found: Tensor, truth: Tensor, name: str) -> None:
    """Where the true gradient exceeds a thousandth of its largest value, the kernel's is not zero."""
    matters = truth.abs() > truth.abs().max() / 1000
    lost = int((found.cpu()[matters.cpu()] == 0).sum())
    assert lost == 0, f"{name}: {lost} gradients of weight are zero"
