"""Triton's CPU interpreter truncates fp32 to bf16 where a GPU rounds to nearest even; tests put that right.

Kernels are never changed to please the interpreter, so the correction lives here.
"""

import numpy as np
import pytest


def mend_bf16_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter's casts between fp32 and bf16 those of the hardware. Does nothing without Triton."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tl = pytest.importorskip("triton.language")
    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return data.view(np.uint16).astype(np.uint32) << 16
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
        return convert(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
