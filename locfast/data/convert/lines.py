"""Images that are files: a .jsonl that lists them with captions and regions, written aside and then renamed."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from locfast.data.convert.drafts import Draft, fit_regions, tidy
from locfast.data.convert.pictures import Unfit, upright_size
from locfast.data.convert.tally import NO_FILE, Tally
from locfast.data.regions.json_form import region_json
from locfast.data.spec import Region
from locfast.errors import UserError

READERS = 8
"""Threads that read the headers of images: a disk is waited for, nothing is computed."""
AT_ONCE = 1024
"""Images whose headers are read before their lines are written."""
NO_WORDS = "neither a caption nor a region"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all data sets whose images are files take."""
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR", help="folders of the images")
    parser.add_argument(
        "--compose-captions",
        type=int,
        default=0,
        metavar="N",
        help="caption images that have none by their first N different phrases, joined by commas; default: do not",
    )


def _check(args: argparse.Namespace) -> None:
    """Raises UserError before anything is read, where the .jsonl could not be written in the end."""
    out: Path = args.out
    if out.suffix != ".jsonl":
        raise UserError(f"asked for --out {out}, which is no .jsonl; type e.g. --out {out.with_suffix('.jsonl')}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"asked for --out {out}, found no folder {out.parent}; make it first: mkdir -p {out.parent}")
    if out.is_dir():
        raise UserError(f"asked for --out {out}, found a folder of that name; name another file")
    if out.exists() and not args.overwrite:
        raise UserError(f"asked for --out {out}, found a file of that name; name another, or add --overwrite")
    if absent := [str(one) for one in args.images if not one.is_dir()]:
        raise UserError(f"asked for --images {absent[0]}, found no such folder; give the one that holds the images")
    if args.compose_captions < 0:
        raise UserError(f"asked for --compose-captions {args.compose_captions}; give a number of phrases, or 0")


def write_lines(args: argparse.Namespace, drafts: Callable[[Tally], Iterable[Draft]]) -> Tally:
    """Check every image and write those that can be used to args.out, a line each, in their order.

    drafts: gets the tally, to count what is no draft, and reads nothing before it is called. Raises UserError where
    --out or --images will not do, or where no image is left: then no file is made.
    """
    _check(args)
    tally = Tally()
    out: Path = args.out
    handle, aside = tempfile.mkstemp(dir=out.absolute().parent, prefix=f".{out.name}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for found, draft in _looked_up(drafts(tally), args.images):
                if line := _line(found, draft, out, args.compose_captions, tally):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if not tally.images:
            raise nothing_left(tally, args.images)
        os.chmod(aside, 0o644)
        os.replace(aside, out)
    except BaseException:
        os.unlink(aside)
        raise
    return tally


def nothing_left(tally: Tally, folders: Sequence[Path]) -> UserError:
    reasons = ", ".join(f"{number} x {reason}" for reason, number in tally.lost_images.most_common(3))
    where = " or ".join(map(str, folders))
    example = f" (looked for {tally.examples[NO_FILE]} in {where})" if NO_FILE in tally.examples else ""
    return UserError(
        f"asked to convert images, found none that can be used: {reasons or 'none is listed'}{example}. Nothing was "
        "written; check that the annotations and --images belong together"
    )


Found = tuple[Path, tuple[int, int]] | Unfit


def _looked_up(drafts: Iterable[Draft], folders: Sequence[Path]) -> Iterator[tuple[Found, Draft]]:
    """Every draft with its file and upright size, or with why there is none, in order."""
    left = iter(drafts)
    with ThreadPoolExecutor(READERS) as threads:
        while some := list(itertools.islice(left, AT_ONCE)):
            yield from zip(threads.map(lambda draft: _look_up(draft, folders), some), some, strict=True)


def _look_up(draft: Draft, folders: Sequence[Path]) -> Found:
    places = [folder / name for folder in folders for name in draft.files]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return Unfit(NO_FILE)
    try:
        return file, upright_size(file, draft.size)[0]
    except Unfit as unfit:
        return unfit


def _line(found: Found, draft: Draft, out: Path, compose: int, tally: Tally) -> dict[str, Any] | None:
    if isinstance(found, Unfit):
        tally.lose(str(found), draft.files[0])
        return None
    file, size = found
    regions = fit_regions(draft.regions, size, tally)
    texts = [text for one in draft.texts if (text := tidy(one))] or _composed(regions, compose)
    if not texts and not regions:
        tally.lose(NO_WORDS, draft.files[0])
        return None
    tally.keep(len(texts), len(regions))
    line: dict[str, Any] = {"image": _path(file, out)}
    if texts:
        line["text"] = texts[0] if len(texts) == 1 else texts
    return line | {"regions": region_json(regions)}


def _composed(regions: Sequence[Region], count: int) -> list[str]:
    phrases = list(dict.fromkeys(region.text for region in regions))[:count]
    return [", ".join(phrases)] if phrases else []


def _path(file: Path, out: Path) -> str:
    """Relative where the image lies below the .jsonl's folder, so that both may be moved together; else absolute."""
    file, folder = file.absolute(), out.absolute().parent
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)
