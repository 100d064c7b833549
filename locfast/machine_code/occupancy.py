"""How many blocks of a kernel a multiprocessor holds at once, and which resource allows no more.

Limits from the CUDA programming guide (technical specifications per compute capability), allocation rules as in
NVIDIA's occupancy calculator.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS = 64 * KIB
"""32-bit registers of a multiprocessor, a quarter of them for each of its four schedulers."""
SCHEDULERS = 4
REGISTER_UNIT = 256
"""Registers are given to warps in units of this many."""
SHARED_UNIT = 128
SHARED_RESERVED = KIB
"""Bytes that the system takes of every block's shared memory, on sm_80 and later."""
TENSOR_MEMORY_COLUMNS = 512
"""Of a multiprocessor from sm_100 on; blocks hold what they allocated until they free it."""


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor: bytes of shared memory (with the reserved ones), warps and blocks."""

    shared: int
    warps: int = 64
    blocks: int = 32


LIMITS = {
    80: Limits(164 * KIB),
    86: Limits(100 * KIB, warps=48, blocks=16),
    89: Limits(100 * KIB, warps=48, blocks=24),
    90: Limits(228 * KIB),
    100: Limits(228 * KIB),
}


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    """Of a multiprocessor; 0 where a single block does not fit."""
    warps: int
    limited_by: str
    """"registers", "shared memory", "tensor memory", "warps" or "blocks"; several if each alone allows no more."""


def occupancy(arch: int, registers: int, shared: int, threads: int, tensor_columns: int = 0) -> Occupancy | None:
    """Of a kernel with `registers` a thread, and `shared` bytes, `threads` and `tensor_columns` a block.

    None for an architecture whose limits are not listed here.
    """
    limits = LIMITS.get(arch)
    if limits is None:
        return None
    warps = -(-threads // 32)
    blocks = {
        "registers": _blocks_by_registers(registers, warps),
        "shared memory": limits.shared // _round_up(shared + SHARED_RESERVED, SHARED_UNIT),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    if tensor_columns:
        blocks["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_columns
    fewest = min(blocks.values())
    return Occupancy(fewest, fewest * warps, ", ".join(name for name, count in blocks.items() if count == fewest))


def _blocks_by_registers(registers: int, warps: int) -> int:
    of_a_warp = _round_up(max(registers, 1) * 32, REGISTER_UNIT)
    if of_a_warp * _round_up(warps, SCHEDULERS) > REGISTERS:  # no such block can start
        return 0
    warps_of_a_scheduler = REGISTERS // SCHEDULERS // of_a_warp
    return SCHEDULERS * warps_of_a_scheduler // warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
