"""How many images a second the loader gives, and what each costs in CPU time, by decoder and number of workers.

It is the loader of a training run, with no model behind it: files are read, decoded, cropped and normalised, and
batches end on the device. Images come in a run's order, over and over, so a source that fits into memory is read from
there after its first pass. A decoder that cannot run here is listed with the reason.
"""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, get_args, get_type_hints

from locfast.config.base import TrainConfig
from locfast.data.spec import CropPolicy
from locfast.errors import UserError

if TYPE_CHECKING:
    import torch

    from locfast.data.commands.rate import Rate
    from locfast.data.spec import ImageSpec, Source

DECODERS = tuple(name for name in get_args(get_type_hints(TrainConfig)["decoder"]))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet; no time depends on them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="image folder, list (.txt), pairs (.jsonl), tar shards, or demo")
    named = [name for name in DECODERS if name != "auto"]
    parser.add_argument("--decoder", nargs="+", choices=DECODERS, default=named, help="these alone; default: all")
    parser.add_argument(
        "--workers", type=int, nargs="+", metavar="N", help="decoding processes; default: 0, 1 and what a run takes"
    )
    parser.add_argument("--size", type=int, default=224, help="height and width of a view (default 224)")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (default 64)")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement, at least (default 5)")
    parser.add_argument("--crop", choices=get_args(CropPolicy), default="random_resized", help="(default %(default)s)")
    parser.add_argument("--device", default="auto", help="where batches go: auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="of order and crops")


def run(args: argparse.Namespace) -> int:
    for name in ("size", "batch", "seconds"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} must be positive, got {getattr(args, name)}")
    if any(workers < 0 for workers in args.workers or ()):
        raise UserError(f"--workers must not be negative, got {' '.join(map(str, args.workers))}")

    from rich.console import Console
    from rich.table import Table

    from locfast.data.loader import default_workers
    from locfast.data.sources import open_source
    from locfast.data.spec import ImageSpec, View
    from locfast.engine.precision import pick_device

    device = pick_device(args.device)
    source = open_source(args.source, seed=args.seed)
    interpolation = "random" if args.crop == "zoom_center" else "bicubic"
    view = View((args.size, args.size), MEAN, STD, args.crop, interpolation=interpolation, flip=True)  # type: ignore[arg-type]
    table = Table(title=f"{source!r}: {args.size} pixels, {args.crop}, batches of {args.batch} on {device}")
    table.add_column("decoder")
    for heading in ("workers", "images/s", "CPU ms/image", "cores busy"):
        table.add_column(heading, justify="right")
    reasons, console = {}, Console(stderr=True)
    for decoder, workers in itertools.product(args.decoder, args.workers or sorted({0, 1, default_workers()})):
        if decoder in reasons:
            continue
        with console.status(f"{decoder}, {workers} workers"):
            try:
                rate = one(source, ImageSpec({"image": view}), decoder, workers, device, args)
            except Exception as error:  # a library that is not there, a driver too old, ...: the others still run
                reasons[decoder] = (str(error).splitlines() or [type(error).__name__])[0]
                continue
        busy = rate.cpu_seconds / rate.seconds
        figures = (f"{workers}", f"{rate.images_per_second:.0f}", f"{rate.cpu_ms:.2f}", f"{busy:.1f}")
        table.add_row(decoder, *figures)
    Console().print(table)
    for decoder, reason in reasons.items():
        print(f"{decoder} does not run here: {reason}")
    return 1 if len(reasons) == len(set(args.decoder)) else 0


def one(
    source: Source, spec: ImageSpec, decoder: str, workers: int, device: torch.device, args: argparse.Namespace
) -> Rate:
    """The rate of one decoder with so many workers. Raises what the loader raises."""
    import torch

    from locfast.data.commands.rate import measure
    from locfast.data.loader import Loader

    loader = Loader(source, spec, seed=args.seed, workers=workers, device=device, decoder=decoder)
    positions = (torch.arange(k * args.batch, (k + 1) * args.batch) for k in itertools.count())
    return measure(lambda: loader.batches(positions), args.batch, workers, args.seconds, device)
