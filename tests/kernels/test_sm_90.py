"""What the compiler makes of the Triton kernels for an H100, read on any machine."""

import os

import pytest

from locfast.machine_code.check import is_checked, offences
from locfast.machine_code.listing import Row, list_kernels


@pytest.fixture(scope="module")
def kernels() -> dict[str, Row]:
    """All but the forms of attention that nothing here holds to anything: they take minutes."""
    pytest.importorskip("triton")
    listing = list_kernels(
        [90],
        jobs=min(8, os.cpu_count() or 1),
        choose=lambda kernel: not kernel["name"].startswith("softcap_attention") or kernel["needs_tensor_cores"],
    )
    return {row.kernel: row for row in listing.rows}


def test_every_kernel_compiles(kernels):
    assert {name: row.failed for name, row in kernels.items() if row.failed} == {}
    ops = {name.split()[0] for name in kernels}
    assert ops >= {"mask_embeddings", "philox", "quantize_rows", "reconstruction_loss", "softcap_attention"}
    assert "region_contrastive_loss" in ops


def test_attention_runs_on_tensor_cores_and_spills_nothing(kernels):
    checked = {(row.dtype, row.head_dim) for row in kernels.values() if is_checked(row)}
    assert checked >= {(dtype, width) for dtype in ("bf16", "fp16") for width in (64, 72, 80, 128)}
    assert offences(list(kernels.values())) == []


def test_the_region_losses_run_on_tensor_cores_and_spill_nothing(kernels):
    checked = {row.kernel for row in kernels.values() if is_checked(row)}
    for form in ("filter", "forward", "backward"):
        assert {f"region_contrastive_loss {form} {dtype}" for dtype in ("bf16", "fp16")} <= checked
    rare = [row for name, row in kernels.items() if name.startswith("region_contrastive_loss")]
    assert {row.kernel: row.spill_bytes for row in rare if row.spill_bytes} == {}


def test_elementwise_kernels_spill_nothing(kernels):
    elementwise = ("mask_embeddings", "philox", "quantize_rows", "reconstruction_loss")
    rows = [row for name, row in kernels.items() if name.startswith(elementwise)]
    assert rows
    for row in rows:
        assert row.registers and row.spill_bytes == 0, row.kernel


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_mask_embeddings_moves_16_bytes_at_a_time(kernels, dtype):
    """Three views: what is narrower are masks, a byte for every pack of a view, and once a program the positions."""
    rows = [row for name, row in kernels.items() if name.startswith("mask_embeddings") and row.dtype == dtype]
    assert len(rows) >= 2
    for row in rows:
        counts = row.instructions
        if "forward" in row.kernel:
            assert counts["STG.128"] == 3 * counts["LDG.128"] > 0 and "STG" not in counts, row.kernel
            assert counts["LDG"] <= counts["STG.128"] + 1, row.kernel
        else:
            assert counts["LDG.128"] == 3 * counts["STG.128"] > 0 and counts["STG"] == 1, row.kernel
            assert counts["LDG"] <= counts["LDG.128"], row.kernel


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_reconstruction_loss_moves_16_bytes_at_a_time_and_sums_a_token_in_a_warp(kernels, dtype):
    """Once a token: the scale, the gradient and two slopes; its distance and two slopes."""
    rows = [row for name, row in kernels.items() if name.startswith("reconstruction_loss") and row.dtype == dtype]
    assert len(rows) >= 2
    for row in rows:
        counts = row.instructions
        assert counts["LDG.128"] >= 6 and counts["LDG"] <= 4, row.kernel
        if "backward" in row.kernel:
            assert counts["STG.128"] >= 3 and not {"STG", "SHFL", "BAR"} & set(counts), row.kernel
        else:
            assert counts["STG"] <= 3, row.kernel
