"""`python -m locfast.vesl COMMAND`: label images with boxes and phrases."""

from __future__ import annotations

import sys
from functools import partial

from locfast.cli import command
from locfast.subcommands import run_one
from locfast.vesl.commands import COMMANDS

PROG = "python -m locfast.vesl"


@partial(command, every_rank=True, go_on="type the same command again")
def main() -> None:
    sys.exit(
        run_one(PROG, "locfast.vesl.commands", COMMANDS, f"To label images, type `{PROG} run --data DATA --out DIR`")
    )


if __name__ == "__main__":
    main()
