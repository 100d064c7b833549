"""Step 3: boxes of the phrases in OUT/phrases, as region shards in OUT/shards, with what each image got in OUT/log.

The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse

from locfast.vesl.commands import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_common(parser)
    shared.add_detect(parser)


def run(args: argparse.Namespace) -> int:
    from locfast.vesl.commands import steps

    with shared.running(args, "detect") as work:
        steps.detect(work, args)
    return 0
