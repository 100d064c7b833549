"""What every evaluation shares: its flags, the models it opens, and what it leaves behind."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.config.base import TrainConfig

if TYPE_CHECKING:
    from locfast.eval.commands.models import Models
    from locfast.eval.global_ability.features import Features, Reading
    from locfast.eval.global_ability.results import Score

POOLS = ("cls", "mean", "cls+mean")


def add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model", nargs="+", required=True, metavar="M", help="run folders, export folders, or models by timm name"
    )
    group.add_argument(
        "--against",
        metavar="M",
        help="what every --model is set against (a run: its own starting model); none: nothing",
    )
    group.add_argument("--image-size", type=int, help="pixels of a side, for models that are no runs")
    group.add_argument("--softcap", type=float, help="soft cap of --model weights that lie in an export folder or file")
    group.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction, default=True, help="random weights without, not of runs"
    )
    group.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="a run's averaged weights; default: where it has any"
    )


CLASS_FOLDERS = "class folders to report: DIR/CLASS/x.jpg"


def add_data(
    parser: argparse.ArgumentParser,
    *,
    train: bool,
    val: str = CLASS_FOLDERS,
    pools: Sequence[str] = POOLS,
    pool_default: str = "cls, or mean without one",
) -> None:
    group = parser.add_argument_group("data")
    if train:
        group.add_argument("--train", required=True, metavar="DIR", help="class folders to learn from: DIR/CLASS/x.jpg")
    group.add_argument("--val", required=True, metavar="DIR" if val == CLASS_FOLDERS else "SRC", help=val)
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results, a new one")
    group.add_argument("--overwrite", action="store_true", help="replace the results of another evaluation there")
    if train:
        group.add_argument("--pool", choices=pools, help=f"what stands for an image; default: {pool_default}")
    add_reading(group)


def add_reading(
    parser: argparse._ActionsContainer,
    *,
    batch_size: int = 128,
    precision: str = "auto",
    seed: str = "of held-out parts, orders and intervals",
) -> None:
    """How images are read, and on what backbones compute."""
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images in a batch (default %(default)s)")
    parser.add_argument("--workers", type=int, help="decoding processes; default: by the number of cores")
    parser.add_argument("--decoder", default=TrainConfig.decoder, help="as in training (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default=precision,
        help="of the backbones (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help=f"{seed} (default %(default)s)")


def add_text(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags of the text tower; the group, for more of them."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text-model",
        metavar="NAME",
        help="of open_clip: ViT-B-16, or a config (.json); default: what a run names that was trained with one",
    )
    group.add_argument("--text-pretrained", metavar="TAG", help="openai, a checkpoint file, or none")
    return group


def reading(args: argparse.Namespace) -> Reading:
    """How images are read and on what, from the flags. Raises UserError for values that cannot be."""
    from locfast.engine.precision import pick_device, pick_precision
    from locfast.errors import UserError
    from locfast.eval.global_ability.features import Reading

    for name, least in (("batch_size", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: type at least {least}.")
    device = pick_device(args.device)
    return Reading(device, pick_precision(args.precision, device), args.batch_size, args.workers, args.decoder)


def tell_progress() -> None:
    """What locfast logs goes to stderr: files that cannot be read, and how far it is."""
    log = logging.getLogger("locfast")
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stderr)]
    log.propagate = False


def keep(
    args: argparse.Namespace,
    evaluation: str,
    found: Sequence[Score],
    models: Models,
    splits: Mapping[str, tuple[Any, Features]],
    settings: Mapping[str, Any],
    notes: Sequence[str],
) -> Path:
    """Write OUT/evaluate.json, whole or not at all. splits: {"val": (its source, what was read of it)}."""
    from locfast.env import environment
    from locfast.eval.global_ability.results import write_results

    given = {name: value for name, value in vars(args).items() if name not in ("handed_on", "overwrite")}
    sections = environment()
    told = {
        "settings": {**{name: str(v) if isinstance(v, Path) else v for name, v in given.items()}, **settings},
        "models": models.described(),
        "data": {
            name: {
                "folder": str(getattr(source, "root", vars(args)[name])),
                "images": len(source),
                "read": len(read),
                **({"classes": len(source.classes)} if hasattr(source, "classes") else {}),
                "unreadable": read.unreadable,
            }
            for name, (source, read) in splits.items()
        },
        "notes": list(notes),
        "versions": {**sections["versions"], **sections["optional"]},
        "gpus": sections["GPUs"],
    }
    return write_results(args.out, evaluation, found, told)


def finish(
    args: argparse.Namespace,
    evaluation: str,
    found: Sequence[Score],
    models: Models,
    splits: Mapping[str, tuple[Any, Features]],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    figures: str = "top-1 accuracy",
    models_down: bool = False,
) -> None:
    """`keep`, and print the table; models_down: one a group of settings, with models below one another."""
    from rich.console import Console

    from locfast.eval.global_ability.table import score_table, tables_by_group

    file = keep(args, evaluation, found, models, splits, settings, notes)
    print(f"{evaluation}, {splits['val'][0]!r}: {figures} in percent, 95 % intervals over images below")
    for table in tables_by_group(found) if models_down else [score_table(found)]:
        Console().print(table)
    for name, (source, read) in splits.items():
        if lost := len(source) - len(read):
            print(f"{lost} of {len(source)} {name} images could not be read and were left out, named in {file}")
    for note in notes:
        print(note)
    print(f"written to {file}")
