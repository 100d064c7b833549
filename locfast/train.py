"""`python -m locfast.train`: train a method on a backbone; with no model and no data, run the embedded demo."""

from __future__ import annotations

import os
import shlex
import sys

from locfast.cli import command, parse_train, peek
from locfast.demo import DEMOS


@command
def main() -> None:
    argv = sys.argv[1:]
    if _listed(argv):
        return
    config = parse_train(argv)
    if config.model == "demo" and config.data == "demo" and config.method in DEMOS:
        from locfast.config.registry import find_class

        find_class(DEMOS[config.method])(config)
    else:
        from locfast.engine.run import train

        run = train(config)
        if os.environ.get("RANK", "0") == "0":
            print(f"Plain timm weights: python -m locfast.export {shlex.quote(str(run))} --to timm")


def _listed(argv: list[str]) -> bool:
    """Answer `--method help` and `--recipe help`."""
    from locfast.config.files import recipe_names
    from locfast.config.registry import METHODS

    for flag, names in (("--method", sorted(METHODS)), ("--recipe", recipe_names())):
        if peek(argv, flag) == "help":
            print("\n".join(names) if names else "none")
            return True
    return False


if __name__ == "__main__":
    main()
