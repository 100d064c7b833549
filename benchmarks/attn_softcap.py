"""Soft-capped attention at the shapes of ViTs: locfast's backends against every peer that is installed.

Everybody gets the same q, k and v, slices of one packed projection. TFLOP/s count 4 B H T^2 D for the forward and 2.5
times that for the backward, whatever is executed. The rows that decide the design's targets are measured first. A wrong
result of locfast's is refused; a peer that is less exact is timed, and its row says by how much.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import _plot
import torch
from _attention_check import Inputs, Judge, Shape
from _attention_targets import FIRST, table, targets
from _harness import Bench, first_line, parser
from baselines import attention as baselines
from baselines._library import NotInstalledError
from torch import Tensor

from locfast.kernels import _backend
from locfast.kernels.softcap_attention import softcap_attention
from locfast.kernels.softcap_attention.triton_tiles import WGMMA, Tiles, tiles_override

OP = "softcap_attention"
BACKENDS = ("triton", "cuda", "tiled", "reference")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIRECTIONS = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""With their work in forwards."""

CASES = {  # about 2^25 elements of q: what fills an H200
    "L/14@336": Shape(64, 16, 577, 64),
    "B/16@224": Shape(128, 12, 197, 64),
    "SO400M/14@384": Shape(48, 16, 729, 72),
    "L/14@224": Shape(128, 16, 257, 64),
    "DINOv2 L/14@518": Shape(24, 16, 1374, 64),  # with four registers, as the next
    "EVA02 L/14@448": Shape(32, 16, 1025, 64),
    "H/14@224": Shape(96, 16, 257, 80),
    "DINOv2 L/14@224": Shape(128, 16, 261, 64),
}
"""In order of worth; the first four have targets."""
SWEEP = {f"sweep {t}": Shape(2**15 // t, 16, t, 64) for t in (64, 128, 197, 256, 384, 577, 768, 1024, 1374, 2048)}
SMOKE = {"smoke 17": Shape(2, 2, 17, 64), "smoke 33": Shape(2, 2, 33, 64)}


@dataclass(frozen=True)
class Contender:
    """One row of every case."""

    name: str
    call: baselines.Attention
    peer: baselines.Peer | None = None
    """None for locfast's own."""
    setting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """What holds while it runs: how a variant of a kernel is forced."""


def main() -> None:
    args = options()
    bench = Bench("attn_softcap", [OP], args)
    dtype = args.dtype or ("fp32" if bench.device.type == "cpu" else "bf16")
    cases = SMOKE if bench.smoke else CASES | (SWEEP if args.plot == "sweep" else {})
    cases = {name: shape for name, shape in cases.items() if _is_wanted(name, args.cases)}
    contenders = present(bench, args, DTYPES[dtype])
    if not cases or not contenders:
        asked = f"--cases {' '.join(args.cases)}" if not cases else f"--only {' '.join(args.only)}"
        print(f"nothing to measure: no name contains what {asked} asks for", file=sys.stderr)
        sys.exit(2)
    if bench.device.type == "cuda" and args.tiles:
        compile_tiles(args, list(cases.values()), DTYPES[dtype])
    for name, who in in_order_of_worth(list(cases), contenders):
        run_case(bench, args, name, cases[name], dtype, who)
    bench.finish()
    rows = bench.result.rows
    chart = bench.path.with_suffix(".svg")
    if _plot.write(rows, chart):
        print(f"time against tokens: {chart}")
    print(
        "\n".join(["", "targets of the design:", *(table(targets(rows)) or ["no row that decides one was measured"])])
    )


def options() -> argparse.Namespace:
    known = parser(__doc__)
    known.add_argument("--only", nargs="+", metavar="WHO", help="those whose name contains one of these")
    known.add_argument("--cases", nargs="+", metavar="CASE", help="those whose name contains one of these")
    known.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=["forward", "backward"])
    known.add_argument("--dtype", choices=DTYPES, help="default bf16; fp32 on a CPU, where Triton's bf16 is not right")
    known.add_argument("--softcap", type=float, default=30.0)
    known.add_argument("--logits", type=float, default=3.0, help="their standard deviation while timed (default 3)")
    known.add_argument("--plot", choices=("cases", "sweep"), default="cases", help="sweep: lengths 64 to 2048 as well")
    known.add_argument("--autotune", action="store_true", help="flex_attention autotuned too: minutes for every case")
    known.add_argument(
        "--tiles",
        nargs="+",
        default=[],
        type=tiles_option,
        metavar="KERNEL:OWNxWALKxWARPSxSTAGES[xREGISTERS]",
        help="e.g. forward:128x64x8x3: a row each",
    )
    args = known.parse_args()
    if not 0 < args.softcap < math.inf:
        known.error(f"--softcap {args.softcap}: it bounds |logits|, so it must be positive and finite")
    return args


def tiles_option(text: str) -> tuple[str, dict[str, Tiles]]:
    """What was typed, and the override it asks for."""
    kernel, _, sizes = text.partition(":")
    try:
        cut = Tiles(*map(int, sizes.split("x")))
    except (TypeError, ValueError):
        cut = None
    if cut is None or kernel not in WGMMA:
        raise argparse.ArgumentTypeError(f"{text!r}: want e.g. forward:128x64x8x3, of one of {', '.join(WGMMA)}")
    return text, {kernel: cut}


def compile_tiles(args: argparse.Namespace, shapes: list[Shape], dtype: torch.dtype) -> None:
    """Fill Triton's cache from all cores: seconds for dozens of tiles, which one process would compile in turn."""
    jobs = [(shape, dtype, args.device, args.softcap, override) for shape in shapes for _, override in args.tiles]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_compile, jobs):
            pass


def _compile(job: tuple[Shape, torch.dtype, str, float, dict[str, Tiles]]) -> None:
    shape, dtype, device, softcap, override = job
    # One image would compile other forms: its stride is not looked at.
    inputs = Inputs(replace(shape, batch=2), dtype, torch.device(device), deviation=3.0)
    call = functools.partial(softcap_attention, softcap=softcap, scale=shape.head_dim**-0.5, backend="triton")
    with mock.patch.dict(tiles_override, override), contextlib.suppress(Exception):  # the row of that tile will say why
        inputs.forward(call)
        inputs.forward_and_backward(call)


def in_order_of_worth(cases: list[str], contenders: list[Contender]) -> list[tuple[str, list[Contender]]]:
    """First whatever decides a target, then the rest; of a sweep only those that come first elsewhere."""
    first = [one for one in contenders if one.name in FIRST]
    others = [one for one in contenders if one.name not in FIRST]
    with_targets = [name for name in cases if name in list(CASES)[:4]]
    steps = [(name, first) for name in with_targets]
    for name in cases:
        steps.append((name, others if name in with_targets else first if name in SWEEP else contenders))
    return [step for step in steps if step[1]]


def run_case(
    bench: Bench, args: argparse.Namespace, name: str, shape: Shape, dtype: str, contenders: list[Contender]
) -> None:
    """These contenders, in all directions, at one shape."""
    torch.compiler.reset()  # or the compiled peers reach their limit of shapes and fall back to eager unasked
    case = f"{name}, {' '.join(f'{letter} {size}' for letter, size in shape.letters.items())}, {dtype}"
    scale = shape.head_dim**-0.5
    try:
        judge = Judge(shape, DTYPES[dtype], bench.device, args.softcap, scale)
        inputs = Inputs(shape, DTYPES[dtype], bench.device, args.logits)
    except torch.OutOfMemoryError as error:
        bench.absent(f"everybody at {case}", first_line(error))
        return
    calls = {one.name: functools.partial(one.call, softcap=args.softcap, scale=scale) for one in contenders}
    for direction in args.directions:
        for one in contenders:
            with one.setting():
                run_row(bench, case, direction, one, calls, shape, inputs, judge)


def run_row(
    bench: Bench,
    case: str,
    direction: str,
    one: Contender,
    calls: Mapping[str, Callable[..., Tensor]],
    shape: Shape,
    inputs: Inputs,
    judge: Judge,
) -> None:
    call, passed = calls[one.name], []

    def check() -> str:
        note = ""
        if one.peer is None:
            judge.ours(call, backward=direction != "forward")
        else:
            note = judge.peer(call, backward=direction != "forward", capped=one.peer.capped)
            exact = calls.get(one.peer.exact) if direction == "forward" else None
            if exact is not None and torch.equal(judge.inputs.forward(call), judge.inputs.forward(exact)):
                note = f"equals {one.peer.exact} to the bit: no approximation was compiled"
        passed.append(True)
        return note

    run = {
        "forward": lambda: inputs.forward(call),
        "backward": inputs.backward_alone(call),
        "both": lambda: inputs.forward_and_backward(call),
    }
    row = bench.measure(
        case,
        direction,
        one.name,
        run[direction],
        check,
        amount=shape.flops * DIRECTIONS[direction],
        unit="TFLOP/s",
        shape=shape.letters,
        memory=run["forward" if direction == "forward" else "both"],
    )
    if row is not None and row.ms is None and direction == "backward" and passed and "memory" not in row.note:
        run_row(bench, case, "both", one, calls, shape, inputs, judge)  # it is right, and cannot run its backward alone


def present(bench: Bench, args: argparse.Namespace, dtype: torch.dtype) -> list[Contender]:
    """Those that were asked for and can run here; a row for each that cannot."""
    found = []
    for one in ours(bench.device, args.tiles):
        backend = one.name.split()[1].rstrip(",")
        if _is_wanted(one.name, args.only):
            try:
                _backend.choose(OP, bench.device, dtype, backend)
                found.append(one)
            except _backend.BackendError as error:
                bench.absent(one.name, str(error))
    for peer in baselines.PEERS + (baselines.AUTOTUNED if args.autotune else ()):
        if not _is_wanted(peer.name, args.only):
            continue
        if peer.needs not in ("any", bench.device.type):
            bench.absent(peer.name, f"needs a {peer.needs} device")
            continue
        try:
            found.append(Contender(peer.name, peer.load(), peer))
        except NotInstalledError:
            bench.absent(peer.name, "not installed")
        except Exception as error:  # libraries fail to load in every way there is
            bench.absent(peer.name, f"does not load: {first_line(error)}")
    return found


def ours(device: torch.device, tiles: list[tuple[str, dict[str, Tiles]]]) -> list[Contender]:
    """locfast's backends, and Triton once more for every tile that was asked for."""
    calls = {name: functools.partial(softcap_attention, backend=name) for name in BACKENDS}
    found = [Contender(f"locfast {name}", call) for name, call in calls.items()]
    if device.type != "cuda":  # the interpreter says nothing about variants that a test does not say better
        return found
    return found + [
        Contender(
            f"locfast triton, {asked}",
            calls["triton"],
            None,
            functools.partial(mock.patch.dict, tiles_override, override),
        )
        for asked, override in tiles
    ]


def _is_wanted(name: str, asked: list[str] | None) -> bool:
    return not asked or any(text in name for text in asked)


if __name__ == "__main__":
    main()
