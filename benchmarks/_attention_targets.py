"""The design's targets for soft-capped attention, held against measured rows. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from _results import Row

OURS = ("locfast triton", "locfast cuda")
FLEX = "flex exact"
SDPA = ("sdpa flash, no cap", "sdpa cudnn, no cap", "sdpa efficient, no cap")
FLASH = ("flash-attn 2", "flash-attn 3", "flash-attn 4")
FIRST = (*OURS, FLEX, *SDPA, *FLASH)
"""Whose rows are measured before all others: they decide the targets."""
LENGTHS = {64: (577, 197, 257), 72: (729,)}
"""Tokens by head dim, in order of worth."""
FORWARD = {  # head dim -> peers, of which the fastest counts, and how many times faster locfast must be
    64: (((FLEX,), 1.3), (SDPA, 1.0), *(((name,), 1.3) for name in FLASH)),
    72: (((FLEX,), 1.3), (SDPA, 1.0), (FLASH[:1], 1.3), (FLASH[1:2], 1.2), (FLASH[2:], 1.0)),
}
BACKWARD = 1.1
"""Against the fastest of all of them."""


@dataclass(frozen=True)
class Target:
    """One line: how many times faster than a peer, wanted and measured."""

    case: str
    direction: str
    ours: str
    """The fastest of locfast's; empty where none was measured."""
    peer: str
    """The fastest of the peers that count, or their names where none was measured."""
    wanted: float
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not compared"
        return "met" if self.measured >= self.wanted else "not met"


def targets(rows: Sequence[Row]) -> list[Target]:
    """Every target for which locfast or a peer has a time in bf16; nothing is filled in."""
    found = []
    for head_dim, lengths in LENGTHS.items():
        for tokens in lengths:
            for direction in ("forward", "backward"):
                here = [row for row in rows if _is_at(row, tokens, head_dim, direction)]
                wanted = FORWARD[head_dim] if direction == "forward" else (((FLEX, *SDPA, *FLASH), BACKWARD),)
                found += [_target(here, direction, peers, factor) for peers, factor in wanted if here]
    return found


def _is_at(row: Row, tokens: int, head_dim: int, direction: str) -> bool:
    at = row.shape.get("T") == tokens and row.shape.get("D") == head_dim and row.direction == direction
    return at and row.case.endswith("bf16") and row.ms is not None and not row.case.startswith("sweep")


def _target(rows: Sequence[Row], direction: str, peers: Sequence[str], wanted: float) -> Target:
    ours = min((row for row in rows if row.who in OURS), key=_ms, default=None)
    peer = min((row for row in rows if row.who in peers), key=_ms, default=None)
    both = ours is not None and peer is not None
    return Target(
        case=rows[0].case,
        direction=direction,
        ours="" if ours is None else ours.who,
        peer=" / ".join(peers) if peer is None else peer.who,
        wanted=wanted,
        measured=_ms(peer) / _ms(ours) if both and ours is not None and peer is not None else None,
    )


def _ms(row: Row) -> float:
    return float("inf") if row.ms is None else row.ms


def table(found: Sequence[Target]) -> list[str]:
    """As Markdown, which a terminal shows well enough; empty where there is nothing to compare."""
    if not found:
        return []
    lines = ["| case | direction | locfast | against | wanted | measured | |", "|---|---|---|---|---|---|---|"]
    for one in found:
        measured = "" if one.measured is None else f"{one.measured:.2f}x"
        cells = (one.case, one.direction, one.ours, one.peer, f"{one.wanted:.1f}x", measured, one.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return lines
