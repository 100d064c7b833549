"""`python -m locfast.data COMMAND`: look at a data source before a run."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys

from locfast.cli import command
from locfast.data.commands import COMMANDS
from locfast.errors import UserError, suggest

PROG = "python -m locfast.data"


@command
def main() -> None:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if argv else 2)
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(_no_command(argv))
    module = importlib.import_module(f"locfast.data.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"{PROG} {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args, others = parser.parse_known_args(rest)
    # A command that hands flags on, to another parser, sets this default; to all others what is left is a mistake.
    if others and not hasattr(args, "handed_on"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.handed_on = others
    sys.exit(module.run(args))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join([f"usage: {PROG} COMMAND ...", "", *lines, "", f"`{PROG} COMMAND --help` says more of each."])


def _no_command(argv: list[str]) -> str:
    """What to tell somebody who typed a source, or a flag, where the command goes."""
    near = suggest(argv[0], COMMANDS)
    return (
        f"asked for `{PROG} {shlex.join(argv)}`, found no command '{argv[0]}'; there are {', '.join(COMMANDS)}"
        f"{near or f'. To check a data source, type `{PROG} stats {shlex.join(argv)}`'}"
    )


if __name__ == "__main__":
    main()
