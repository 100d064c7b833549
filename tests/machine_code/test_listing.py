"""Kernels compiled in other processes, for GPUs that are not there."""

import pytest

from locfast.machine_code.check import offences
from locfast.machine_code.listing import Listing, Row, list_kernels

pytest.importorskip("triton")
SAMPLES = "tests.machine_code.samples"


@pytest.fixture(scope="module")
def listing() -> Listing:
    return list_kernels(
        [80, 90, 100, 123], jobs=2, modules=[SAMPLES, "tests.machine_code", "tests.machine_code.absent"]
    )


def row(listing: Listing, name: str, arch: int) -> Row:
    (found,) = [row for row in listing.rows if row.kernel == f"sample {name}" and row.arch == arch]
    return found


def test_rows_are_in_the_order_of_the_list_and_then_of_the_architectures(listing):
    names = ["matmul bf16", "spilling bf16", "without tensor cores fp32", "crash", "broken", "mistyped"]
    rows = [row for row in listing.rows if row.known]
    assert [(row.kernel, row.arch) for row in rows] == [(f"sample {n}", a) for n in names for a in (80, 90, 100)]


@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_tensor_core_instructions_have_each_architecture_s_name(listing, arch, instruction):
    found = row(listing, "matmul bf16", arch)
    assert list(found.tensor_core) == [instruction] and found.tensor_core[instruction] > 0
    assert found.products_on_fma == 0 < found.products


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_kernel_that_fits_has_its_resources_and_occupancy(listing, arch):
    found = row(listing, "matmul bf16", arch)
    assert 32 <= found.registers < 255 and found.spill_bytes == 0
    assert found.threads == 128 and found.occupancy.warps == 4 * found.occupancy.blocks > 0
    assert 64 * 64 * 2 * 2 <= found.shared_bytes < 160 * 1024
    assert {"LDL", "STL"}.isdisjoint(found.instructions)
    assert (found.tensor_columns > 0) == (arch == 100)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_spills_are_seen_and_compile_options_arrive(listing, arch):
    found = row(listing, "spilling bf16", arch)
    assert found.threads == 64 and found.registers <= 64 < found.spill_bytes
    assert found.instructions["LDL"] > 0 and found.instructions["STL"] > 0


def test_fp32_products_with_ieee_rounding_are_told_from_those_on_tensor_cores(listing):
    found = row(listing, "without tensor cores fp32", 90)
    assert found.tensor_core == {} and found.products == found.products_on_fma > 0
    assert found.instructions["FFMA"] > 64


def test_a_kernel_that_does_not_compile_is_a_row_with_the_reason(listing):
    assert "nowhere_defined is not defined" in row(listing, "broken", 90).failed
    assert "['x_ptr', 'y_ptr']" in row(listing, "mistyped", 90).failed


def test_a_compiler_that_crashes_costs_one_row(listing):
    for arch in (80, 90, 100):
        assert row(listing, "crash", arch).failed == "the compiler died (134): LLVM ERROR: Cannot select: intrinsic"
    assert row(listing, "matmul bf16", 100).failed is None


def test_an_architecture_unknown_to_triton_is_a_row_that_says_so(listing):
    (found,) = [row for row in listing.rows if row.arch == 123]
    assert found.failed == f"Triton {listing.triton} knows no sm_123" and not found.known


def test_a_module_that_lists_nothing_is_skipped_with_a_note_and_one_that_is_absent_without(listing):
    assert listing.notes == ["tests.machine_code lists no kernels: it has no variants()"]


def test_the_check_names_what_spills(listing):
    rows = [row(listing, name, 90) for name in ("matmul bf16", "spilling bf16", "without tensor cores fp32")]
    (offence,) = offences(rows)
    assert offence.startswith("sample spilling bf16: spills ")
