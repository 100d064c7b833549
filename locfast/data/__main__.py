"""`python -m locfast.data COMMAND`: look at a data source before a run."""

from __future__ import annotations

import sys

from locfast.cli import command
from locfast.data.commands import COMMANDS
from locfast.subcommands import run_one

PROG = "python -m locfast.data"


@command
def main() -> None:
    sys.exit(run_one(PROG, "locfast.data.commands", COMMANDS, f"To check a data source, type `{PROG} stats {{}}`"))


if __name__ == "__main__":
    main()
