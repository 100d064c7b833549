"""Which shards a pattern stands for."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from locfast.errors import UserError


def expand(pattern: str) -> list[Path]:
    """Paths that a shard pattern stands for: `shard-{000..012}.tar`, `{a,b}-{0..3}.tar`, `*.tar`, or one path.

    Braces name every shard, so a missing one is found out; a glob takes what is there. Raises UserError for a range
    that makes no sense and a glob without a match.
    """
    paths: list[Path] = []
    for one in braces(pattern):
        found = sorted(glob.glob(one)) if any(c in one for c in "*?[") and not os.path.exists(one) else [one]
        if not found:
            raise UserError(f"asked for the shards {pattern}, found no file that fits {one}; check the pattern")
        paths += map(Path, found)
    return paths


def shards_among(names: Iterable[str]) -> list[str]:
    """Those of a folder's file names that are taken for shards, sorted."""
    return sorted(name for name in names if name.endswith(".tar") and not name.startswith("."))


def braces(pattern: str) -> list[str]:
    """All names of a pattern with `{000..012}` and `{a,b}` in it. UserError for braces that make no sense."""
    parts = re.split(r"(\{[^{}]*\})", pattern)
    if any(brace in part for part in parts[::2] for brace in "{}"):
        raise UserError(
            f"asked for the shards {pattern}, found a brace without its partner; write e.g. shard-{{000..012}}.tar"
        )
    choices = [[part] if i % 2 == 0 else _choices(part[1:-1], pattern) for i, part in enumerate(parts)]
    return list(map("".join, itertools.product(*choices)))


def _choices(inside: str, pattern: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = match.groups()
        if int(first) > int(last):
            raise UserError(
                f"asked for the shards {pattern}, found a range that runs down: {{{inside}}}; write {{{last}..{first}}}"
            )
        width = len(first) if first.startswith("0") else 0
        return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise UserError(
        f"asked for the shards {pattern}, found {{{inside}}}, which is neither a range nor a choice; "
        "write {000..012} or {a,b}"
    )
