"""Blocks on a multiprocessor, against the occupancy calculator's rules worked out by hand."""

import pytest

from locfast.machine_code.occupancy import KIB, Occupancy, occupancy


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "columns", "blocks", "limited_by"),
    [
        (80, 32, 0, 256, 0, 8, "registers, warps"),
        (80, 16, 0, 32, 0, 32, "blocks"),
        (90, 16, 0, 1024, 0, 2, "warps"),
        # 33 registers of 32 threads are 1056, given as 1280: 12 warps on each of four schedulers, 6 blocks of 8
        (90, 33, 0, 256, 0, 6, "registers"),
        (90, 168, 0, 384, 0, 1, "registers"),
        (90, 255, 0, 128, 0, 2, "registers"),
        (90, 128, 0, 160, 0, 3, "registers"),
        # nine warps would do with 57600 of the 65536 registers, but are dealt to four schedulers, so that they need
        # those of twelve
        (90, 200, 0, 288, 0, 0, "registers"),
        (90, 64, 227 * KIB, 128, 0, 1, "shared memory"),
        (90, 64, 227 * KIB + 1, 128, 0, 0, "shared memory"),
        (90, 64, 113 * KIB, 128, 0, 2, "shared memory"),
        (90, 64, 113 * KIB + 1, 128, 0, 1, "shared memory"),
        (80, 64, 163 * KIB, 128, 0, 1, "shared memory"),
        (80, 64, 163 * KIB + 1, 128, 0, 0, "shared memory"),
        (100, 64, 48 * KIB, 128, 256, 2, "tensor memory"),
        (86, 32, 0, 128, 0, 12, "warps"),
    ],
)
def test_the_scarcest_resource_decides(arch, registers, shared, threads, columns, blocks, limited_by):
    found = occupancy(arch, registers, shared, threads, columns)
    assert found == Occupancy(blocks, blocks * -(-threads // 32), limited_by)


def test_nothing_is_claimed_of_an_architecture_without_limits():
    assert occupancy(75, 32, 0, 128) is None
