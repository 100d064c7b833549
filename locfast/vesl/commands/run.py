"""All three steps: captions, their noun phrases, and boxes of the phrases as region shards in OUT/shards.

The same command again goes on where it was stopped. Under torchrun each rank does its own chunks of the source; ranks
do not wait for each other.
"""

from __future__ import annotations

import argparse

from locfast.vesl.commands import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_common(parser)
    shared.add_caption(parser)
    shared.add_phrases(parser)
    shared.add_detect(parser)


def run(args: argparse.Namespace) -> int:
    from locfast.vesl.commands import steps
    from locfast.vesl.detector import MODEL, check
    from locfast.vesl.hub import check_weights, load
    from locfast.vesl.phrases import check_nltk

    with shared.running(args, "caption") as work:
        # what a later step lacks is told before hours of the first one
        work.check(
            caption=shared.caption_settings(args, work.precision),
            phrases=shared.phrases_settings(args),
            detect=shared.detect_settings(args, work.precision),
        )
        if not work.done("phrases"):
            check_nltk()
        if not work.done("detect"):
            check(args.detector, args.detector_size)
            load("AutoProcessor", args.detector, "--detector")
            check_weights(MODEL, args.detector, "--detector")
        for step in (steps.caption, steps.phrases, steps.detect):
            step(work, args)
    return 0
