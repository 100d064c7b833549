"""`python -m locfast.analyze`: how far backbones look and how their features spread, layer by layer and side by side.

Average attention distance by head, the singular values of the features' covariance, and attention maps of the last
block: the analyses of LUT (section 6.2, figures 1, 4, A and B), for runs, exports and any model by timm name.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.cli import command
from locfast.eval.commands import shared

if TYPE_CHECKING:
    from locfast.eval.commands.models import Models


@command
def main() -> None:
    args = _parser().parse_args()
    _run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m locfast.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    shared.add_models(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", required=True, metavar="D", help="images: a folder, a .txt list, .tar shards, demo, as in training"
    )
    group.add_argument("--images", type=int, default=1000, metavar="N", help="at most, drawn by --seed (default 1000)")
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results, a new one")
    group.add_argument("--overwrite", action="store_true", help="replace the results of another analysis there")
    shared.add_reading(group, batch_size=32, precision="fp32", seed="of the images' choice, and of random weights")
    maps = parser.add_argument_group("attention maps")
    maps.add_argument("--pictures", type=int, default=4, metavar="K", help="images that have maps (default 4, 0: none)")
    maps.add_argument(
        "--query",
        nargs="+",
        metavar="ROW,COL",
        help="patches that look, counted from 0 in the first model's grid; other grids take the patch at the same "
        "place. Default: the centre, and a quarter of the image from two corners",
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from locfast.data.sources import open_source
    from locfast.env import environment
    from locfast.errors import UserError
    from locfast.eval.analysis.results import FILE, described, tables, write_results
    from locfast.eval.analysis.run import Model, patch_at, watch
    from locfast.eval.commands.models import Models
    from locfast.eval.global_ability.results import check_out
    from locfast.report import write_report

    for name, least in (("images", 2), ("pictures", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: type at least {least}.")
    shared.tell_progress()
    reading = shared.reading(args)
    source = open_source(args.data, seed=args.seed)
    check_out(args.out, args.overwrite, FILE, "an analysis")
    opened = Models(args)
    first = next(iter(opened.subjects.values())).backbone
    queries = _queries(args.query, first.grid)
    points = [((row + 0.5) / first.grid[0], (column + 0.5) / first.grid[1]) for row, column in queries]
    models = {
        name: Model(one.backbone, one.softcap, tuple(patch_at(point, one.backbone.grid) for point in points))
        for name, one in opened
    }
    seen = watch(source, models, reading, limit=args.images, pictures=args.pictures, seed=args.seed)
    found = described(seen, {} if args.against == "none" else _against(opened))
    sections = environment()
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    told = {
        "settings": {
            **{name: value for name, value in given.items() if name != "overwrite"},
            "device": str(reading.device),
            "precision": reading.precision,
            "query": [list(query) for query in queries],
        },
        "models": {
            name: {**one, "grid": list(opened.subjects[name].backbone.grid), "queries": list(models[name].queries)}
            for name, one in opened.described().items()
        },
        "data": {"source": repr(source), "images": len(source), "read": seen.images, "unreadable": seen.unreadable},
        "pictures": list(seen.names),
        "found": found,
        "versions": {**sections["versions"], **sections["optional"]},
        "gpus": sections["GPUs"],
    }
    file = write_results(args.out, seen, told)
    report = write_report(args.out)
    console = Console()
    for caption, table in tables(found):
        print(f"{caption}, {seen.images} images")
        console.print(table)
    if seen.unreadable:
        print(f"{len(seen.unreadable)} images could not be read and were left out, named in {file}")
    print(f"written to {file} and {report}")


def _against(models: Models) -> dict[str, str]:
    """Which other model's spectrum is taken from a model's: what it is set against, or else the first one."""
    first = next(iter(models.subjects))
    others = {name: models.against.get(name, first) for name, _ in models}
    return {name: other for name, other in others.items() if name != other and name not in models.against.values()}


def _queries(asked: list[str] | None, grid: tuple[int, int]) -> list[tuple[int, int]]:
    from locfast.errors import UserError
    from locfast.eval.analysis.run import default_queries

    if asked is None:
        return list(dict.fromkeys(default_queries(grid)))
    found: list[Any] = []
    for word in asked:
        parts = word.split(",")
        inside = len(parts) == 2 and all(part.strip().isdecimal() for part in parts)
        query = tuple(map(int, parts)) if inside else ()
        if not inside or any(at >= n for at, n in zip(query, grid, strict=True)):
            raise UserError(
                f"--query {word}: type ROW,COL, counted from 0, in the first model's grid of {grid[0]} rows and "
                f"{grid[1]} columns, for example {grid[0] // 2},{grid[1] // 2}."
            )
        found.append(query)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    main()
