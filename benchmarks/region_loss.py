"""How near does the region-contrastive loss come to a matmul's speed, and what memory does it need?

Against the loss over stored logits, in eager PyTorch and under torch.compile, open_clip's where installed, and
locfast's other backends; with near-duplicate captions left out of the negatives, and without. TFLOP/s count 4 R^2 E for
the forward and 10 R^2 E for forward and backward in one, without the filter 2 and 8, whatever is executed. The row that
decides the design's target is measured first. A wrong result of locfast's is refused; a peer that is less exact is
timed, and its row says by how much. By default slow ones are left out where they tell little.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import _region_plan
import _region_plot
import _region_share
import torch
from _harness import Bench, first_line, parser
from _region_check import DTYPE, Inputs, Judge, Shape
from _region_targets import table, targets
from _variants import Tiles
from baselines import contrastive as baselines
from baselines._library import NotInstalledError

from locfast.kernels import _backend
from locfast.kernels.region_contrastive_loss import OP, region_contrastive_loss
from locfast.kernels.region_contrastive_loss.tiles import COSINES, HALF

DIRECTIONS = ("forward", "both")
BACKENDS = ("triton", "tiled", "reference")
FIRST = "locfast triton"
CUBLAS = "locfast triton, cosines by cuBLAS"
"""The same passes over panels of cosines in memory, which a matrix product has left there."""
REGIONS = (32768, 8192, 65536, 131072, 4096, 1024)
FILTERED = [Shape(regions, 768) for regions in REGIONS]
CASES = [
    *FILTERED,
    Shape(32768, 1024),
    Shape(32768, 512),
    Shape(32768, 768, scale=20.0),
    *(Shape(regions, 768, threshold=None) for regions in REGIONS),
]
"""In order of worth; the first has the target."""
SMOKE = [Shape(regions, 32, threshold=threshold) for regions in (64, 200) for threshold in (0.9, None)]
WORTH = {
    "eager": REGIONS,  # 131072 of them have 64 GiB of logits: where that does not fit, it fails at once
    "torch.compile": (32768, 8192),  # seconds of compilation for a shape and direction
    CUBLAS: (32768, 8192),
    "locfast tiled": (32768, 8192, 65536, 4096, 1024),
    "open_clip": (32768, 8192),
    "locfast reference": (8192, 4096, 1024),  # its products are in fp32
}
"""Regions at which others than Triton are measured by default, filtered, and without a filter at the first of them."""


@dataclass(frozen=True)
class Contender:
    """One row of every case that it can run."""

    name: str
    call: baselines.Loss
    peer: baselines.Peer | None = None
    """None for locfast's own."""
    directions: tuple[str, ...] = DIRECTIONS
    setting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """What holds while it runs: how a variant of a kernel is forced."""


class Case:
    """A shape on a device; inputs and right results are made when they are first wanted, and kept."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device

    @functools.cached_property
    def inputs(self) -> Inputs:
        return Inputs(self.shape, self.device)

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge(self.inputs)


def main() -> None:
    args = options()
    if args.plan or args.share:
        (_region_plan if args.plan else _region_share).main(args)
        return
    bench = Bench("region_loss", [OP], args)
    shapes = [shape for shape in (SMOKE if bench.smoke else CASES) if _is_wanted(shape.name, args.cases)]
    contenders = present(bench, args)
    steps = in_order_of_worth(shapes, contenders, args.all or bench.smoke)
    if not steps:
        print("nothing to measure: no name contains what --cases or --who ask for, or --all is needed", file=sys.stderr)
        sys.exit(2)
    cases = {shape: Case(shape, bench.device) for shape in shapes}
    for shape, one in steps:
        torch.compiler.reset()  # or torch.compile reaches its limit of shapes and falls back to eager unasked
        for direction in (way for way in args.directions if way in one.directions):
            with one.setting():
                run_row(bench, cases[shape], direction, one)
    bench.finish()
    rows = bench.result.rows
    chart = bench.path.with_suffix(".svg")
    if _region_plot.write(rows, chart):
        print(f"memory against regions: {chart}")
    print(
        "\n".join(["", "targets of the design:", *(table(targets(rows)) or ["no row that decides one was measured"])])
    )


def options() -> argparse.Namespace:
    known = parser(__doc__)
    known.add_argument("--who", nargs="+", metavar="NAME", help="rows whose name contains one of these")
    known.add_argument("--cases", nargs="+", metavar="CASE", help='those whose name contains one of these: "R 8192,"')
    known.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    known.add_argument(
        "--tiles",
        nargs="+",
        default=[],
        type=lambda text: Tiles({"triton": HALF}, text),
        metavar="triton-KERNEL:AxB..",
        help="a row each beside the usual ones; numbers as in the op's tiles.py",
    )
    known.add_argument("--all", action="store_true", help="everybody at every case: minutes")
    known.add_argument("--plan", action="store_true", help="measure nothing: CLOC's batch on 64 GPUs, worked out")
    known.add_argument(
        "--link-gb-s", type=float, default=_region_plan.LINK, help="assumed by --plan (default %(default)s)"
    )
    known.add_argument("--share", action="store_true", help="measure what one of those 64 computes, on this GPU alone")
    return known.parse_args()


def in_order_of_worth(
    shapes: list[Shape], contenders: list[Contender], everything: bool
) -> list[tuple[Shape, Contender]]:
    """First Triton at all shapes, then the others at those where they tell something."""
    first = [one for one in contenders if one.name.startswith(FIRST) and one.name != CUBLAS]
    others = [one for one in contenders if one not in first]
    steps = [(shape, one) for shape in shapes for one in first]
    for shape in shapes:
        able = [one for one in others if one.peer is None or one.peer.filters or shape.threshold is None]
        steps += [(shape, one) for one in able if everything or is_worth_it(one, shape)]
    return steps


def is_worth_it(one: Contender, shape: Shape) -> bool:
    regions = WORTH[one.name]
    if one.peer is not None and not one.peer.filters:
        return shape in [Shape(count, 768, threshold=None) for count in regions]
    return (shape in FILTERED and shape.regions in regions) or shape == Shape(regions[0], 768, threshold=None)


def run_row(bench: Bench, case: Case, direction: str, one: Contender) -> None:
    def run() -> Any:
        return case.inputs.forward(one.call) if direction == "forward" else case.inputs.both(one.call)

    def check() -> str:
        found = run() if direction == "both" else (run(),)
        if one.peer is not None:
            return case.judge.peer(found)
        case.judge.ours(found)
        return ""

    flops = case.shape.flops(direction)
    bench.measure(
        case.shape.name, direction, one.name, run, check, amount=flops, unit="TFLOP/s", shape=case.shape.letters
    )


def present(bench: Bench, args: argparse.Namespace) -> list[Contender]:
    """Those that were asked for and can run here; a row for each that cannot."""
    found = []
    for backend in BACKENDS:
        one = Contender(f"locfast {backend}", ours(backend))
        if _is_wanted(one.name, args.who):
            try:
                _backend.choose(OP, bench.device, DTYPE, backend)
                found.append(one)
            except _backend.BackendError as error:
                bench.absent(one.name, str(error))
    if any(one.name == FIRST for one in found):
        by_cublas = functools.partial(mock.patch.dict, COSINES, {"from": "cublas"})
        found.append(Contender(CUBLAS, ours("triton"), setting=by_cublas))
        found += [Contender(str(tiles), ours("triton"), setting=tiles.setting) for tiles in args.tiles]
    for peer in baselines.PEERS:
        if not _is_wanted(peer.name, args.who):
            continue
        try:
            found.append(Contender(peer.name, peer.load(), peer))
        except NotInstalledError:
            bench.absent(peer.name, "not installed")
        except Exception as error:  # libraries fail to load in every way there is
            bench.absent(peer.name, f"does not load: {first_line(error)}")
    return found


def ours(backend: str) -> baselines.Loss:
    def loss(
        regions: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor, threshold: float | None
    ) -> torch.Tensor:
        return region_contrastive_loss(
            regions, texts, logit_scale=logit_scale, filter_threshold=threshold, backend=backend
        )

    return loss


def _is_wanted(name: str, asked: list[str] | None) -> bool:
    return not asked or any(text in name for text in asked)


if __name__ == "__main__":
    main()
