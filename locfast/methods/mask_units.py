"""Masks of an exact count over squares that are hidden together: MAE's are single patches, SimMIM's 2 x 2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from locfast.errors import UserError
from locfast.methods import masks
from locfast.random import Keys, uniform


@dataclass(frozen=True)
class MaskUnits:
    """A grid of patches cut into squares of `side` x `side`.

    Raises UserError where the squares do not tile the grid of `model`.
    """

    model: str
    grid: tuple[int, int]
    side: int

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows % self.side or columns % self.side:
            raise UserError(
                f"mask_unit {self.side}: squares of {self.side} x {self.side} patches do not tile the {rows} x "
                f"{columns} patches of {self.model}; use --lut.mask-unit 1, or another --image-size"
            )

    @property
    def squares(self) -> tuple[int, int]:
        """Rows and columns of squares."""
        return self.grid[0] // self.side, self.grid[1] // self.side

    @property
    def count(self) -> int:
        return self.squares[0] * self.squares[1]

    def patches(self, squares: int) -> int:
        """How many patches so many squares are."""
        return squares * self.side**2

    def visible(self, hidden_share: float, flag: str, some_hidden: bool, times: int = 1) -> int:
        """How many squares stay visible: at least one; fewer than all where `some_hidden`; so many `times` at once.

        flag: what to name in the UserError for a share that does not allow it.
        """
        visible = math.floor(self.count * (1 - hidden_share) + 1e-6)  # as MAE; SimMIM rounds up what it hides
        if 0 < visible * times <= self.count - (some_hidden and times == 1):
            return visible
        disjoint = " twice over" if times > 1 else ""
        raise UserError(
            f"--{flag} {hidden_share} leaves {visible} of {self.count} places visible on {self.model}'s {self.grid[0]} "
            f"x {self.grid[1]} patches, but some must be visible{disjoint}{' and some hidden' if some_hidden else ''}; "
            "type another share, or a larger --image-size"
        )

    def draw(self, keys: Keys, visible: int, disjoint: int) -> Tensor:
        """`disjoint` random masks (1 or 2) that show no patch twice, `visible` squares each: [B, disjoint, N] bool."""
        first = masks.exact(keys, self.squares, visible, "random")
        return self._tile([first] if disjoint == 1 else [first, masks.exactly(keys, ~first, visible)])

    def draw_apart(self, keys: Keys, visible: int, streams: list[str]) -> Tensor:
        """A random mask for every stream, each by itself, `visible` squares each: [B, streams, N] bool."""
        nothing = torch.zeros(len(keys), self.count, dtype=torch.bool, device=keys.index.device)
        orders = [uniform(keys, stream, self.count).argsort(dim=1, stable=True) for stream in streams]
        return self._tile([nothing.scatter(1, order[:, :visible], True) for order in orders])

    def _tile(self, squares: list[Tensor]) -> Tensor:
        """Masks over squares [B, squares] -> over patches [B, masks, N]."""
        tiles = torch.stack(squares, 1).unflatten(-1, self.squares)
        return tiles.repeat_interleave(self.side, -2).repeat_interleave(self.side, -1).flatten(-2)
