"""Flags of the three steps, and what they have in common: settings, ranks, the source, the log on the screen."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.errors import UserError

if TYPE_CHECKING:
    import torch

    from locfast.data.spec import Source
    from locfast.vesl.aside import Aside
    from locfast.vesl.folder import Folder
    from locfast.vesl.stage import Stage

SHARD_SIZE = 1000


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="SRC", help="image folder, list, pairs, tar shards; default: what OUT is of")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the same one again to go on")
    parser.add_argument("--shard-size", type=int, metavar="N", help=f"samples in a shard (default {SHARD_SIZE})")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default 32)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes of a rank; default: by its cores")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; each rank of a torchrun takes its own GPU")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU")
    parser.add_argument("--overwrite", action="store_true", help="make this step and those after it anew")


def add_caption(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("captions")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--captions", choices=("given",), help="the source's own texts")
    which.add_argument("--captioner", metavar="NAME", help="an image-to-text model of transformers: a name or a folder")
    group.add_argument("--keep-given", action="store_true", help="the source's own texts too, behind the generated one")
    group.add_argument("--prompt", default="", help="what the captioner is told beside the image")
    group.add_argument("--keep-prompt", action="store_true", help="leave the prompt in front of the caption")
    group.add_argument("--max-new-tokens", type=int, default=77, metavar="N", help="of a caption (default 77)")
    group.add_argument("--num-beams", type=int, default=1, metavar="N", help="1: greedy (default)")


def add_phrases(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("phrases")
    group.add_argument("--max-phrases", type=int, default=20, metavar="N", help="of an image (default 20)")


def add_detect(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("detector")
    name = "google/owlv2-large-patch14-ensemble"
    group.add_argument("--detector", default=name, metavar="NAME", help=f"a name or a folder (default {name})")
    group.add_argument("--detector-size", type=int, default=448, metavar="PX", help="side of the frame (default 448)")
    group.add_argument("--min-score", type=float, default=0.1, metavar="S", help="boxes need more (default 0.1)")
    group.add_argument("--nms", type=float, metavar="IOU", help="of boxes of a phrase that overlap more, the surest")
    group.add_argument("--max-regions", type=int, metavar="N", help="of an image, the surest; default: all")


def caption_settings(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """What decides over the captions."""
    if not args.captioner:
        if args.keep_given or args.prompt or args.keep_prompt:
            raise UserError("--keep-given, --prompt and --keep-prompt are for a --captioner; --captions given has none")
        return {"captions": "given"}
    _check(args.max_new_tokens > 0 and args.num_beams > 0, "--max-new-tokens and --num-beams are 1 or more")
    names = ("captioner", "keep_given", "prompt", "keep_prompt", "max_new_tokens", "num_beams")
    return {"captions": "generated", **{name: getattr(args, name) for name in names}, "precision": precision}


def phrases_settings(args: argparse.Namespace) -> dict[str, Any]:
    _check(args.max_phrases > 0, f"--max-phrases is 1 or more, got {args.max_phrases}")
    return {"max_phrases": args.max_phrases}


def detect_settings(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    _check(args.detector_size > 0, f"--detector-size is a number of pixels, got {args.detector_size}")
    _check(0 <= args.min_score < 1, f"--min-score is from 0 to below 1, got {args.min_score}")
    _check(args.nms is None or 0 <= args.nms <= 1, f"--nms is an intersection over union, from 0 to 1; got {args.nms}")
    _check(args.max_regions is None or args.max_regions > 0, f"--max-regions is 1 or more, got {args.max_regions}")
    names = ("detector", "detector_size", "min_score", "nms", "max_regions")
    return {**{name: getattr(args, name) for name in names}, "precision": precision}


@dataclass
class Run:
    """A command at work on its folder."""

    folder: Folder
    aside: Aside
    source: Source
    device: torch.device
    precision: str
    workers: int
    batch_size: int
    data: dict[str, Any]
    fresh: tuple[str, ...]

    def check(self, **asked: dict[str, Any]) -> None:
        """UserError where OUT was begun with other settings than these; nothing is written."""
        from locfast.vesl import settings

        settings.check(self.folder.out, {"data": self.data, **asked}, self.fresh)

    def done(self, name: str) -> bool:
        """Whether this rank has nothing to do in a stage, so that no model need be loaded."""
        return not self.fresh and next(self.folder.missing(name), None) is None

    def stage(self, name: str, asked: dict[str, Any], device: torch.device | None = None) -> Stage:
        """Begin a stage: with what it needs at hand, its settings are written and, with --overwrite, its files go."""
        from locfast.vesl import settings
        from locfast.vesl.meter import Meter
        from locfast.vesl.stage import Stage

        settings.agree(self.folder, {"data": self.data, name: asked}, self.aside, self.fresh)
        if self.fresh:
            settings.forget(self.folder, self.aside)
            self.fresh = ()
        return Stage(name, self.folder, self.aside, Meter(device))


@contextmanager
def running(args: argparse.Namespace, first: str) -> Iterator[Run]:
    """What a command that begins with the step `first` works with. Raises UserError for every mistake in the flags."""
    from locfast.data.loader import default_workers
    from locfast.data.sources import open_source
    from locfast.engine.distributed import environment
    from locfast.engine.precision import pick_device, pick_precision
    from locfast.vesl import settings
    from locfast.vesl.aside import Aside
    from locfast.vesl.folder import Folder

    _check(args.batch_size > 0, f"--batch-size is 1 or more, got {args.batch_size}")
    _check(args.shard_size is None or args.shard_size > 0, f"--shard-size is 1 or more, got {args.shard_size}")
    _check(args.workers is None or args.workers >= 0, f"--workers is 0 or more, got {args.workers}")
    _check(not args.out.is_file(), f"--out {args.out} is a file; give a folder")
    world = environment()
    device = pick_device(args.device, world.local_rank, world.size)
    fresh: tuple[str, ...] = ()
    if args.overwrite:
        fresh = settings.PARTS if first == "caption" else settings.PARTS[settings.PARTS.index(first) :]
    before = {} if "data" in fresh else settings.saved(args.out).get("data", {})
    spec = args.data or before.get("data")
    if not spec:
        raise UserError(f"--out {args.out}: nothing was begun there, so say of what: --data SRC")
    source = open_source(_place(spec))  # names, and so the files' bytes, do not depend on where it is typed
    size = args.shard_size or before.get("shard_size", SHARD_SIZE)
    data = {"data": _place(spec), "samples": len(source), "names": _names(source), "shard_size": size}
    settings.check(args.out, {"data": data}, fresh)
    args.out.mkdir(parents=True, exist_ok=True)
    folder = Folder(args.out, len(source), size, world.rank, world.size)
    aside = Aside(args.out)
    try:
        workers = default_workers() if args.workers is None else args.workers
        precision = pick_precision(args.precision, device)
        if not fresh:  # of an --overwrite that was killed
            settings.forget(folder, aside)
        with telling(world.rank, world.size):
            yield Run(folder, aside, source, device, precision, workers, args.batch_size, data, fresh)
    finally:
        aside.close()


@contextmanager
def telling(rank: int, ranks: int) -> Iterator[None]:
    """Inside the block, what the stages log goes to stderr, and says which rank it is of."""
    log = logging.getLogger("locfast")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s" if ranks > 1 else "%(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


def _names(source: Source) -> str:
    """A hash of all names in their order: as many files as before may be others, or lie in another order."""
    from locfast.data.sources import sample_name

    told = hashlib.sha256()
    for index in range(len(source)):
        told.update(sample_name(source, index).encode("utf-8", "surrogateescape") + b"\0")
    return told.hexdigest()


def _place(spec: str) -> str:
    """A path that does not depend on where the command is typed; other sources as they are."""
    path = os.path.expanduser(spec)
    # up to where a pattern begins, which may be in a folder's name
    plain = re.split(r"[*?\[{]", path, maxsplit=1)[0]
    local = os.path.exists(path) or os.path.exists(os.path.dirname(plain) or ".")
    return os.path.abspath(path) if local and "://" not in spec and spec.partition(":")[0] != "demo" else spec


def _check(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)
