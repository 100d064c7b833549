"""Commands that have commands: `python -m locfast.X COMMAND ...`, one module each."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from locfast.errors import UserError, suggest


def run_one(prog: str, package: str, commands: Mapping[str, str], hint: str = "") -> Any:
    """Run the command that stands first in sys.argv; returns its exit code.

    commands: its name -> what `--help` says of it. `some-name` is the module `package.some_name`, which has a
    docstring, `add_arguments(parser)` and `run(args)`, and imports torch inside `run` alone. hint: what to tell
    somebody who typed something else first, `{}` standing for it. Raises UserError for a command that there is not.
    """
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(prog, commands))
        sys.exit(0 if argv else 2)
    name, *rest = argv
    if name not in commands:
        # A word with a dash is a flag whose command was left out, not a command mistyped ("--count" is near "convert").
        near = "" if name.startswith("-") else suggest(name, commands)
        near = near or f". {hint.format(shlex.join(argv))}" * bool(hint)
        raise UserError(
            f"asked for `{prog} {shlex.join(argv)}`, found no command '{name}'; there are {', '.join(commands)}{near}"
        )
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"{prog} {name}",
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
    return module.run(args)


def _usage(prog: str, commands: Mapping[str, str]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {what}" for name, what in commands.items()]
    return "\n".join([f"usage: {prog} COMMAND ...", "", *lines, "", f"`{prog} COMMAND --help` says more of each."])
