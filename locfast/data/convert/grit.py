"""GRIT: phrases of a caption with their boxes, from tar shards as img2dataset leaves them.

Every shard is converted by itself to one of the same name in --out. A run that was stopped goes on with --resume.
Download with --save_additional_columns '["noun_chunks","ref_exps"]' and --resize_mode keep_ratio or no.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from locfast.data.convert.grit_sample import PHRASES, Options, samples
from locfast.data.convert.shard_folder import Work, check_folder, kept, shards_by_name, write
from locfast.data.convert.tally import Tally
from locfast.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="a .tar shard, a folder of them, or a pattern like 'grit/{00000..00099}.tar'")
    parser.add_argument(
        "--phrases",
        choices=list(PHRASES),
        default="ref_exps",
        help="what a box is called: the whole referring expression (default), its noun chunk alone, or both",
    )
    parser.add_argument("--min-score", type=float, default=0.0, help="drop boxes of a lower score; default: none")
    parser.add_argument("--workers", type=int, default=1, help="processes, a shard each; default: 1")
    parser.add_argument("--resume", action="store_true", help="keep the shards that are there, and convert the others")


def convert(args: argparse.Namespace) -> Tally:
    """Raises UserError where nothing can be done at all; a broken shard is told in the tally, the others are done."""
    if args.resume and args.overwrite:
        raise UserError("asked for --resume and --overwrite; one keeps the shards that are there, the other does not")
    if not math.isfinite(args.min_score):
        raise UserError(f"asked for --min-score {args.min_score}; a score is a number, of GRIT's from 0 to 1")
    options = Options(args.phrases, args.min_score)
    targets = shards_by_name(args.shards, args.out)
    work = [Work(shard, args.out / name, options.told()) for name, shard in targets.items()]
    check_folder(args.out, work, resume=args.resume, overwrite=args.overwrite)
    tally, left, done = Tally(), [], 0
    for one in work:
        if args.resume and (counts := kept(one)):
            tally.add(counts)
            done += 1
        else:
            left.append(one)
    if done:
        print(f"{done} of {len(work)} shards are there already", file=sys.stderr)
    for number, counts in enumerate(_converted(left, options, args.workers), 1):
        tally.add(counts)
        print(f"{done + number} of {len(work)} shards, {tally.images} images", file=sys.stderr, flush=True)
    if not tally.images and not tally.broken:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in tally.lost_images.most_common(3))
        raise UserError(f"asked to convert {args.shards}, found no image that can be used: {reasons or 'none in it'}")
    return tally


def _converted(work: list[Work], options: Options, workers: int) -> Iterator[Tally]:
    from concurrent.futures import as_completed

    from locfast.data.orphan import pool

    one = partial(convert_shard, options=options)
    if workers <= 1 or len(work) <= 1:
        yield from map(one, work)
        return
    with pool(min(workers, len(work))) as helpers:
        for future in as_completed([helpers.submit(one, shard) for shard in work]):
            yield future.result()


def convert_shard(work: Work, options: Options) -> Tally:
    """Convert one shard; what is wrong with it stands in the tally's `broken`, and then nothing was written."""
    tally = Tally()
    try:
        write(work, samples(Path(work.shard), options, tally), tally)
    except UserError as error:
        return Tally(broken=[str(error)])
    return tally
