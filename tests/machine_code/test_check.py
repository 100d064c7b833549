"""What CI holds the kernels to."""

from dataclasses import replace

import pytest

from locfast.machine_code.check import is_checked, offences
from locfast.machine_code.listing import Row

GOOD = Row(
    "attention",
    "triton",
    90,
    dtype="bf16",
    head_dim=128,
    needs_tensor_cores=True,
    registers=168,
    spill_bytes=0,
    products=2,
    products_on_fma=0,
    instructions={"HGMMA": 8, "FFMA": 3},
)


def test_a_kernel_without_spills_and_with_tensor_cores_passes():
    assert is_checked(GOOD) and offences([GOOD]) == []


@pytest.mark.parametrize(
    ("change", "offence"),
    [
        ({"spill_bytes": 8}, "attention: spills 8 bytes a thread"),
        ({"instructions": {"FFMA": 3, "HFMA2": 1}}, "attention: has no tensor-core instructions"),
        ({"products_on_fma": 1}, "attention: runs 1 of 2 products without tensor cores"),
        ({"failed": "no room"}, "attention: no room"),
    ],
)
def test_what_is_wrong_is_named(change, offence):
    assert offences([replace(GOOD, **change)]) == [offence]


@pytest.mark.parametrize(
    "change", [{"arch": 80}, {"head_dim": 256}, {"head_dim": None}, {"dtype": "fp32"}, {"needs_tensor_cores": False}]
)
def test_other_kernels_may_spill(change):
    assert offences([replace(GOOD, spill_bytes=64, **change)]) == []
