"""Step 2: the noun phrases of the captions in OUT/captions, in OUT/phrases (CLOC, listing 1).

The same command again goes on where it was stopped. It needs NLTK and its data: python -m nltk.downloader punkt_tab
averaged_perceptron_tagger_eng
"""

from __future__ import annotations

import argparse

from locfast.vesl.commands import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_common(parser)
    shared.add_phrases(parser)


def run(args: argparse.Namespace) -> int:
    from locfast.vesl.commands import steps

    with shared.running(args, "phrases") as work:
        steps.phrases(work, args)
    return 0
