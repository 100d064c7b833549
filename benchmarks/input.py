"""How many images a second become batches, and how much CPU time each costs: locfast, torch's DataLoader, webdataset.

Everybody does the same work: a random resized crop (bicubic), a flip, normalised fp32 on the device, batches of one
size from the same number of workers. Rounds go through all ways and all sets of photographs in turn, so that what else
the machine does hits all alike, and every round starts its workers anew. Files lie in memory after the first round: no
disk is measured. Before it is timed, every decoder's pixels are held to those of locfast's CPU decoder.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import SMOKE_RESULTS, command, first_line, machine, parser, use
from _input_check import Pixels, outcome
from _input_report import needs, printed
from _results import RESULTS, ROOT, Measurement, Row, commit, sources_hash
from baselines import loading

from locfast.data.commands.bench import DECODERS, MEAN, STD
from locfast.data.commands.rate import Rate, measure
from locfast.data.loader import Loader, default_workers
from locfast.data.sources import ImageFolder, TarShards
from locfast.data.sources.split import Chosen
from locfast.data.spec import ImageSpec, Source, View

PHOTOS = [root / "shared" / "data" / name for name in ("photos_original", "photos") for root in (ROOT, ROOT.parent)]
"""Measured where they are there: photographs as their cameras left them, and 1,000 small ones."""
SOURCES = [
    f"locfast/data/{name}"
    for name in ("assemble.py", "crop.py", "decode", "loader.py", "order.py", "reader.py", "sources")
]
PER_SHARD = 64
"""Images in a tar shard, over and over those of the folder: so small a shard is opened often enough to count."""
SMOKE_PHOTOS = 12


@dataclass
class Way:
    """One way to make batches of one set of photographs."""

    case: str
    who: str
    start: Callable[[], Iterator[object]]
    shape: dict[str, int]
    note: str = ""
    rates: list[Rate] = field(default_factory=list)
    failed: str = ""


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--photos", type=Path, nargs="+", help="folders of JPEG files")
    known.add_argument("--size", type=int, nargs="+", default=[224], help="pixels of a view's side (default 224)")
    known.add_argument("--batch", type=int, default=64)
    known.add_argument("--workers", type=int, default=default_workers(), help="(default %(default)s here)")
    known.add_argument("--rounds", type=int, default=5)
    known.add_argument("--seconds", type=float, default=2.0, help="of one way in one round, at least")
    known.add_argument("--only", nargs="+", metavar="WHO", help="ways with one of these in their name")
    args = known.parse_args()
    if args.smoke:
        args.rounds, args.seconds, args.batch = 2, 0.1, 4
    for folder in args.photos or ():
        if not folder.is_dir():
            known.error(f"{folder} is no folder; give --photos DIR, with JPEG files in it")
    args.photos = args.photos or [folder for folder in PHOTOS if folder.is_dir()]
    if not args.photos:
        print("there are no photographs beside this checkout, and nothing is measured; give --photos DIR")
        return
    device, (head, dirty) = use(args.device), commit()
    result = Measurement(
        benchmark="input",
        machine=machine(device) | {"cpu": machine(torch.device("cpu"))["cpu"]},
        sources={source: sources_hash(source) for source in SOURCES},
        commit=head,
        dirty=dirty,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command(),
        smoke=args.smoke,
    )
    print(" | ".join(f"{key} {value}" for key, value in result.machine.items()))
    out, deadline = args.out or (SMOKE_RESULTS if args.smoke else RESULTS), time.monotonic() + args.budget
    with tempfile.TemporaryDirectory() as scratch:
        ways = [
            way
            for folder in args.photos
            for size in args.size
            for way in ways_of(folder, size, Path(scratch) / folder.name, device, args)
            if not args.only or any(word in way.who for word in args.only)
        ]
        for number in range(args.rounds):
            if time.monotonic() > deadline:
                print(f"{number} of {args.rounds} rounds: the time is up")
                break
            for way in ways:
                run(way, args, device)
            result.rows = [row for way in ways for row in rows(way)]
            result.write(out)
            print(f"round {number + 1} of {args.rounds} done", flush=True)
    print(printed(result.rows, needs(RESULTS)))
    print(f"written to {result.path(out)}")


def ways_of(folder: Path, size: int, scratch: Path, device: torch.device, args: argparse.Namespace) -> list[Way]:
    """All that can make batches of a folder's images, as files and as tar shards; and what cannot, with the reason."""
    photos = jpegs(folder, SMOKE_PHOTOS if args.smoke else None)
    files = [Path(photos.name(i)) for i in range(len(photos))]
    shards = write_shards(files, scratch, max(4, 2 * args.workers), 4 if args.smoke else PER_SHARD)
    case = f"{folder.name}, {size} px, batches of {args.batch}, {args.workers} workers"
    shape = {"B": args.batch, "workers": args.workers, "size": size}
    pixels, found = Pixels(photos, size), []
    for decoder in (name for name in DECODERS if name != "auto"):
        checked = {} if decoder == "cpu" else outcome(partial(pixels.of_decoder, decoder, device))
        for layout, source in (("folder", photos), ("tar", TarShards(shards))):
            start = partial(batches, source, size, decoder, device, args)
            found.append(Way(case, f"locfast {decoder}, {layout}", start, shape, **checked))
    for name, (make, data, layout) in {
        "DataLoader, PIL": (loading.pil, files, "folder"),
        "DataLoader, torchvision": (loading.torchvision_jpeg, files, "folder"),
        "webdataset": (loading.webdataset, shards, "tar"),
    }.items():
        try:
            peer = make(data, size, MEAN, STD)
        except Exception as error:  # not installed, or it does not load
            found.append(Way(case, f"{name}, {layout}", iter, shape, failed=f"did not run: {first_line(error)}"))
            continue
        start = partial(peer.start, args.workers, args.batch, device)
        found.append(Way(case, f"{name}, {layout}", start, shape, **outcome(partial(pixels.of_peer, peer.pixels))))
    return found


def jpegs(folder: Path, most: int | None) -> Chosen:
    """The JPEG files of a folder, or the first of them."""
    photos = ImageFolder(folder)
    names = (i for i in range(len(photos)) if photos.name(i).lower().endswith((".jpg", ".jpeg")))
    return Chosen(photos, np.array(list(islice(names, most))))


def write_shards(files: Sequence[Path], folder: Path, shards: int, images: int) -> list[Path]:
    """`shards` tar files of `images` images each, the files over and over, in webdataset's layout."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:04}.tar" for number in range(shards)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(number * images, (number + 1) * images):
                tar.add(files[i % len(files)].resolve(), f"{i:07}.jpg")
    return paths


def batches(
    source: Source, size: int, decoder: str, device: torch.device, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Of locfast's loader, without end."""
    view = View((size, size), MEAN, STD, "random_resized", interpolation="bicubic", flip=True)
    loader = Loader(source, ImageSpec({"image": view}), seed=0, workers=args.workers, device=device, decoder=decoder)
    return loader.batches(torch.arange(k * args.batch, (k + 1) * args.batch) for k in count())


def run(way: Way, args: argparse.Namespace, device: torch.device) -> None:
    """One round of one way, unless it failed before."""
    if way.failed:
        return
    try:
        way.rates.append(measure(way.start, args.batch, args.workers, args.seconds, device))
    except Exception as error:  # the others still run
        way.failed = f"did not run: {first_line(error)}"


def rows(way: Way) -> list[Row]:
    """Milliseconds of a batch with images a second, and of CPU for an image; or one row that says why not."""
    if way.failed or not way.rates:
        return [Row(way.case, "batch", way.who, note=way.failed or "not reached", shape=way.shape)]
    batch = Row(way.case, "batch", way.who, unit="images/s", note=way.note, shape=way.shape)
    batch.ms, batch.ms_p20, batch.ms_p80 = spread([1e3 * way.shape["B"] / rate.images_per_second for rate in way.rates])
    batch.rate = 1e3 * way.shape["B"] / batch.ms
    cpu = Row(way.case, "CPU", way.who, shape=way.shape)
    cpu.ms, cpu.ms_p20, cpu.ms_p80 = spread([rate.cpu_ms for rate in way.rates])
    return [batch, cpu]


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile over the rounds."""
    low, _, _, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    return statistics.median(times), low, high


if __name__ == "__main__":
    main()
