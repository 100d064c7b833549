"""A page of pictures to judge labels by eye: boxes and phrases on images, coloured by score."""

from __future__ import annotations

import argparse
from pathlib import Path

from locfast.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="OUT of a run, or any other source with regions")
    parser.add_argument("--out", type=Path, default=Path("labels.html"), metavar="FILE", help="(default %(default)s)")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="pictures, evenly spread (default 24)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(args: argparse.Namespace) -> int:
    from locfast.data.decode import UnreadableImage
    from locfast.data.reader import explain
    from locfast.data.sources import open_source, sample_name
    from locfast.report.page import write_page
    from locfast.vesl import settings
    from locfast.vesl.commands.page import Picture, labels_page
    from locfast.vesl.folder import RESULT
    from locfast.vesl.pixels import whole

    if args.count < 1:
        raise UserError(f"--count is 1 or more, got {args.count}")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: not a file in a folder that exists. Make the folder, or name another.")
    if args.out.exists() and not args.overwrite:
        raise UserError(f"--out {args.out} is there already. Give another name, or --overwrite.")
    given = Path(args.shards)
    if (given / settings.NAME).is_file():
        given = given / RESULT["detect"][0]
        if not given.is_dir():
            raise UserError(f"{args.shards}: no shard was made there yet; `python -m locfast.vesl detect` makes them")
    source = open_source(str(given) if given.exists() else args.shards)
    count = min(args.count, len(source))
    pictures, bad = [], []
    for index in (i * len(source) // count for i in range(count)):
        try:
            record = source.read(index)
            pictures.append(Picture(record.name, whole(record.image), record.texts, record.regions or ()))
        except (OSError, UnreadableImage) as error:
            bad.append(f"cannot read {sample_name(source, index)}: {explain(error)}")
    if not any(one.regions for one in pictures):
        raise UserError(f"{args.shards}: none of the {count} samples looked at has a region. Give OUT of a run.")
    name = given.absolute()
    title = f"Labels of {name.parent.name if name.name == 'shards' else name.name}"
    write_page(args.out, labels_page(title, repr(source), pictures, len(source)))
    print("\n".join([*bad, f"{len(pictures)} pictures in {args.out}"]))
    return 0
