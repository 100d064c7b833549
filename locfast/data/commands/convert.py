"""Make a public data set's captions and boxes into images with regions, as `--data` takes them.

Nothing is downloaded and no image file is copied. What cannot be used is dropped, and counted by reason.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from pathlib import Path

from locfast.data.convert import KINDS

NAMED = 20
"""Shards that could not be converted and are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, about in KINDS.items():
        module = importlib.import_module(f"locfast.data.convert.{name.replace('-', '_')}")
        kind = kinds.add_parser(
            name,
            help=about,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(kind)
        what = "folder of the new shards" if name == "grit" else "the .jsonl to write"
        kind.add_argument("--out", type=Path, required=True, help=what)
        kind.add_argument("--overwrite", action="store_true", help="replace what --out has")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 2 where some shards could not be converted; the others are."""
    tally = importlib.import_module(f"locfast.data.convert.{args.kind.replace('-', '_')}").convert(args)
    for line in tally.lines():
        print(line)
    for one in tally.broken[:NAMED]:
        print(f"not converted: {one}")
    if len(tally.broken) > NAMED:
        print(f"... and {len(tally.broken) - NAMED} more")
    if tally.images:
        print(f"written to {args.out}; look at it with")
        print(f"  python -m locfast.data stats {shlex.quote(str(args.out))}")
    return 2 if tally.broken else 0
