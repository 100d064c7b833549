"""LVIS v1: every object's box with the name of its class, made readable ("bow_(weapon)" is "bow (weapon)").

The images are COCO's of 2017; images of both its folders appear in either split of LVIS, so give both as --images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from locfast.data.convert.coco import drafts
from locfast.data.convert.coco_files import read_captions
from locfast.data.convert.lines import add_arguments as add_common
from locfast.data.convert.lines import write_lines
from locfast.data.convert.tally import Tally


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("instances", type=Path, help="lvis_v1_train.json or lvis_v1_val.json")
    parser.add_argument(
        "--captions", type=Path, nargs="+", default=[], metavar="FILE", help="COCO's captions_*2017.json, one or both"
    )
    add_common(parser)


def convert(args: argparse.Namespace) -> Tally:
    from locfast.data.regions.annotated import class_text, named  # imports torch, which --help must not

    return write_lines(
        args, lambda tally: drafts(args.instances, read_captions(args.captions), tally, class_text, named)
    )
