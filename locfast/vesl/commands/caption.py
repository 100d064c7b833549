"""Step 1: captions of all images, the source's own or a captioner's, in OUT/captions.

The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse

from locfast.vesl.commands import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_common(parser)
    shared.add_caption(parser)


def run(args: argparse.Namespace) -> int:
    from locfast.vesl.commands import steps

    with shared.running(args, "caption") as work:
        steps.caption(work, args)
    return 0
