"""Variants of a kernel's cut that one run times beside the usual ones: `--tiles BACKEND-DIRECTION:AxBxC`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from typing import Any
from unittest import mock

Known = Mapping[str, dict[str, Any]]
"""Backend -> its tiles by direction, as in an op's tiles.py."""


class Tiles:
    """One variant that was asked for: what was typed, which kernel it is for, and how to force it."""

    def __init__(self, known: Known, text: str) -> None:
        self.text = text
        name, _, numbers = text.partition(":")
        self.backend, _, self.direction = name.partition("-")
        try:
            table = known[self.backend]
            wanted = type(table[self.direction])(*map(int, numbers.split("x")))
        except (KeyError, TypeError, ValueError):
            kernels = [f"{backend}-{direction}" for backend, table in known.items() for direction in table]
            raise argparse.ArgumentTypeError(
                f"{text!r}: want KERNEL:AxBxC with the numbers of the op's tiles.py, of one of {', '.join(kernels)}"
            ) from None
        self.setting = lambda: mock.patch.dict(table, {self.direction: wanted})

    def __str__(self) -> str:
        return f"locfast {self.text}"


def add_option(parser: argparse.ArgumentParser, known: Known) -> None:
    parser.add_argument(
        "--tiles",
        nargs="+",
        default=[],
        type=lambda text: Tiles(known, text),
        metavar="KERNEL:AxBxC",
        help="a row each beside the usual ones; numbers as in the op's tiles.py",
    )
    parser.add_argument("--who", nargs="+", metavar="NAME", default=[""], help="rows whose name contains one of these")


def contenders(asked: list[Tiles], backends: list[str]) -> list[tuple[str, str, tuple[str, ...], Any]]:
    """(name, backend, directions, setting) of locfast's rows: each backend as it is, then each variant."""
    usual = [(f"locfast {backend}", backend, ("forward", "backward"), contextlib.nullcontext) for backend in backends]
    return usual + [(str(one), one.backend, (one.direction,), one.setting) for one in asked]
