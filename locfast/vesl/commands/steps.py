"""The three steps, each over all chunks of this rank. A step's model is loaded before its settings are written."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from locfast.data.spec import Record
from locfast.vesl import stages
from locfast.vesl.commands import shared
from locfast.vesl.feed import Jobs, feed
from locfast.vesl.phrases import check_nltk
from locfast.vesl.pixels import framed, whole
from locfast.vesl.stage import check_captioned, jobs

log = logging.getLogger("locfast")


def caption(run: shared.Run, args: argparse.Namespace) -> None:
    asked = shared.caption_settings(args, run.precision)
    run.check(caption=asked)
    if _nothing(run, "caption"):
        check_captioned(run.folder)
        return
    made, say = _generated(run, asked) if args.captioner else _given(run)
    stage = run.stage("caption", asked, run.device if args.captioner else None)
    wanted = ((chunk, list(run.folder.indices(chunk))) for chunk in stage.pending())
    stages.caption(stage, feed(made, jobs(wanted, run.batch_size), run.workers), say)
    check_captioned(run.folder)


def phrases(run: shared.Run, args: argparse.Namespace) -> None:
    asked = shared.phrases_settings(args)
    run.check(phrases=asked)
    if _nothing(run, "phrases"):
        return
    check_nltk()
    stages.phrases(run.stage("phrases", asked), args.max_phrases, run.workers)


def detect(run: shared.Run, args: argparse.Namespace) -> None:
    from locfast.vesl.detector import Detector

    asked = shared.detect_settings(args, run.precision)
    run.check(detect=asked)
    if _nothing(run, "detect"):
        return
    detector = Detector(args.detector, args.detector_size, run.device, run.precision)
    stage = run.stage("detect", asked, run.device)
    side, pads = detector.side, detector.pads
    made = Jobs(run.source, lambda record: (framed(record.image, side, pads), record.image), stages.Frames.of)
    waiting = stages.Waiting(stage)
    choice = stages.Choice(args.min_score, args.nms, args.max_regions)
    fed = feed(made, jobs(waiting, run.batch_size), run.workers)
    stages.detect(stage, fed, waiting, detector, choice)


def _nothing(run: shared.Run, name: str) -> bool:
    if run.done(name):
        log.info("%s: all chunks were done before", name)
    return run.done(name)


def _given(run: shared.Run) -> tuple[Jobs, Any]:
    """The source's own texts; no image is decoded."""
    return Jobs(run.source, _texts), lambda batch: [("given" if texts else "none", texts) for texts in batch]


def _generated(run: shared.Run, asked: dict[str, Any]) -> tuple[Jobs, Any]:
    from locfast.vesl.captioner import Captioner

    names = ("prompt", "keep_prompt", "max_new_tokens", "num_beams")
    captioner = Captioner(asked["captioner"], run.device, run.precision, **{name: asked[name] for name in names})

    def collate(items: list[tuple[Any, list[str]]]) -> tuple[dict[str, Any], list[list[str]]]:
        return captioner.prepare([image for image, _ in items]), [texts for _, texts in items]

    def say(batch: tuple[dict[str, Any], list[list[str]]]) -> list[stages.Said]:
        inputs, given = batch
        said = captioner.captions(inputs)
        return [_both(text, texts if asked["keep_given"] else []) for text, texts in zip(said, given, strict=True)]

    return Jobs(run.source, lambda record: (whole(record.image), _texts(record)), collate), say


def _both(generated: str, given: list[str]) -> stages.Said:
    origin = ("both" if given else "generated") if generated else ("given" if given else "none")
    return origin, [*([generated] if generated else []), *given]


def _texts(record: Record) -> list[str]:
    """A line each, as shards have them."""
    return [text for one in record.texts if (text := " ".join(one.split()))]
