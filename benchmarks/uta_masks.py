"""How often each place is hidden by UTA's masks, over 5000 samples (UTA, figure 3): a table, and docs/uta-masks.svg."""

from __future__ import annotations

import torch
from _results import ROOT

from locfast.methods import masks
from locfast.random import Keys
from locfast.report.heat import colours

PICTURE = ROOT / "docs" / "uta-masks.svg"
GRID, RATIO, SAMPLES = (16, 16), 0.4, 5000
KINDS = {"reversed_block": "reversed blocks", "block": "blocks", "random": "random"}
CELL, GAP, TOP, HIGHEST = 12, 24, 26, 0.8
"""Pixels of a patch, between maps and above them; the share at the upper end of the colours."""


def shares(kind: str) -> torch.Tensor:
    """The share of samples in which each place is hidden: [rows, columns]."""
    keys = Keys(0, torch.zeros(SAMPLES, dtype=torch.int64), torch.arange(SAMPLES))
    kept = round(GRID[0] * GRID[1] * (1 - RATIO))
    return (~masks.exact(keys, GRID, kept, kind)).double().mean(0).view(GRID)


def picture(found: dict[str, torch.Tensor]) -> str:
    """The maps side by side under one scale of colours."""
    side = GRID[1] * CELL
    width, height = len(found) * (side + GAP) + 70, TOP + GRID[0] * CELL + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13" role="img" aria-label="Share of samples in which a place is hidden, by kind of mask">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (kind, share) in enumerate(found.items()):
        left = number * (side + GAP)
        low, high = share.min(), share.max()
        parts.append(f'<text x="{left + 4}" y="16">{KINDS[kind]}, {low:.2f} to {high:.2f}</text>')
        paint = colours((share / HIGHEST).clamp(0, 1).numpy())
        parts += [
            f'<rect x="{left + 4 + CELL * x}" y="{TOP + CELL * y}" width="{CELL}" height="{CELL}" '
            f'fill="#{r:02x}{g:02x}{b:02x}"/>'
            for y, row in enumerate(paint.tolist())
            for x, (r, g, b) in enumerate(row)
        ]
    left, steps = len(found) * (side + GAP) + 4, 32
    for step in range(steps):
        r, g, b = colours(torch.tensor(1 - step / (steps - 1)).numpy()).tolist()
        tall = GRID[0] * CELL / steps
        parts.append(f'<rect x="{left}" y="{TOP + tall * step:.1f}" width="14" height="{tall + 0.5:.1f}" '
                     f'fill="#{r:02x}{g:02x}{b:02x}"/>')  # fmt: skip
    for share in (HIGHEST, HIGHEST / 2, 0.0):
        y = TOP + GRID[0] * CELL * (1 - share / HIGHEST)
        parts.append(f'<text x="{left + 19}" y="{min(max(y + 4, TOP + 10), height - 8):.0f}">{share:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    found = {kind: shares(kind) for kind in KINDS}
    for kind, share in found.items():
        print(f"{KINDS[kind]:<16} hidden in {share.min():.3f} to {share.max():.3f} of {SAMPLES} samples")
    PICTURE.write_text(picture(found), encoding="utf-8")
    print(f"written to {PICTURE}")


if __name__ == "__main__":
    main()
