"""`python -m locfast.evaluate COMMAND`: what an aligned backbone knows of whole images, beside the original."""

from __future__ import annotations

import sys

from locfast.cli import command
from locfast.eval.commands import COMMANDS
from locfast.subcommands import run_one


@command
def main() -> None:
    sys.exit(run_one("python -m locfast.evaluate", "locfast.eval.commands", COMMANDS))


if __name__ == "__main__":
    main()
