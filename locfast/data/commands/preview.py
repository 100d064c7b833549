"""A picture of what the model will see first: the views of a run's first samples, with the method's masks over them,
and with boxes and phrases where it learns from regions.

Takes every flag of `python -m locfast.train` (but --out, which names the picture). Source, order, crops, colours and
masks are those of a run with the same flags, from its first image on; only mixup and cutmix, whose partners come from
the same micro-batch, mix the images shown. Weights are random: none is fetched.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.errors import UserError

if TYPE_CHECKING:
    from locfast.config.base import TrainConfig
    from locfast.data.commands.sheet import Sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] --data SRC [--out PNG] [--count N] [--start N] [any flag of locfast.train ...]"
    parser.add_argument("--out", type=Path, metavar="PNG", default=Path("preview.png"), help="(default %(default)s)")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="samples (default 16)")
    parser.add_argument(
        "--start", type=int, default=0, metavar="N", help="position of the first: step k of a run starts at k * batch"
    )
    parser.set_defaults(handed_on=[])


def run(args: argparse.Namespace) -> int:
    if args.count < 1 or args.start < 0:
        raise UserError(f"--count must be positive and --start not negative, got {args.count} and {args.start}")
    if args.out.suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
        raise UserError(f"--out {args.out}: the picture's file; end it in .png (a run folder is of no use here)")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: not a file in a folder that exists. Make the folder, or name another.")
    from locfast.cli import parse_train

    sheet = look(parse_train(args.handed_on), args.start, args.count)
    picture = sheet.draw()
    picture.save(args.out)
    print(f"{sheet.title}\nwritten to {args.out} ({picture.width} x {picture.height} pixels)")
    return 0


def look(config: TrainConfig, start: int, count: int) -> Sheet:
    """The samples at positions `start` .. `start + count - 1` of the run that `config` describes."""
    import torch

    from locfast.config.registry import method_config
    from locfast.data.commands.sheet import Sheet
    from locfast.data.loader import Loader
    from locfast.data.sources import open_source
    from locfast.engine.precision import pick_device
    from locfast.engine.validate import split
    from locfast.methods import create_method

    source, _ = split(open_source(config.data, seed=config.seed), config.val, config.seed)
    method = create_method(
        config.method,
        method_config(config),
        model=config.model,
        pretrained=False,
        image_size=config.image_size,
        seed=config.seed,
    )
    spec = dataclasses.replace(method.image_spec(), records=True)  # for the names
    device = pick_device(config.device)  # of the loader: some decoders work there
    loading: dict[str, Any] = {"decoder": config.decoder, "shuffle": config.shuffle}
    loader = Loader(source, spec, seed=config.seed, workers=0, device=device, **loading)
    batch = next(loader.batches([torch.arange(start, start + count)]))
    batch = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    batch["views"] = {name: view.cpu() for name, view in batch["views"].items()}
    draw = method.draw(method.keys(config.seed, batch))
    sheet = Sheet(f"{source!r}, as {config.method} on {config.model} sees them with seed {config.seed}")
    for name, seen in method.seen(batch, draw).items():
        sheet.add_view(name, seen.images, spec.views[name], seen.visible, seen.masks)
        if spec.regions:
            sheet.add_regions(name, batch["records"], batch["geometry"][name])
    for position, index, record in zip(batch["position"], batch["index"], batch["records"], strict=True):
        sheet.captions.append(f"{position}: #{index} {Path(record.name).name}")
    return sheet
