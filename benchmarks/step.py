"""How many images a second does a MaskEmbed step take, where does its time go, and what does the public code reach?

`--method uta` and `--method lut` ask instead what dropping tokens saves, `--method cloc` what regions cost.

Each side runs eagerly and under torch.compile, at its own best micro-batch: sizes double until the memory or the gain
ends. A side's loss and gradient norm are compared with the other's, and a compiled step's with the eager one's. A step
is forward, backward, clip and optimiser, in bf16 autocast over fp32 weights; its parts are timed in runs of their own,
with the backward pass cut at the embeddings. Weights are random: no time depends on them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _harness import Bench, first_line, parser
from _results import RESULTS, Row
from _step_dropped import CASES as DROPPED
from _step_dropped import measure as measure_dropped
from _step_flops import Shape, step_flops
from _step_regions import measure as measure_regions
from _step_report import write_picture
from _step_sides import Side, locfast_side, public_side
from _step_time import batch_of, forward, kernels, time_parts, time_steps

from locfast.config.maskembed import MaskEmbedConfig
from locfast.methods import create_method
from locfast.methods.maskembed import MaskEmbed


@dataclass(frozen=True)
class Case:
    model: str
    smallest: int
    """The first micro-batch that is tried."""
    size: int | None = None
    """Pixels of a side, where not the model's own."""


CASES = {
    "clip_b16": Case("vit_base_patch16_clip_quickgelu_224.openai", 64),
    "clip_l14_336": Case("vit_large_patch14_clip_quickgelu_336.openai", 16),
    "siglip_so400m_384": Case("vit_so400m_patch14_siglip_384.webli", 8),
}
"""By the recipes' names: ViT-B/16@224, L/14@336, SO400M/14@384."""
SMOKE = {"tiny": Case("vit_tiny_patch16_224", 2, 64)}
SOURCES = [
    *("mask_embeddings", "select_views", "softcap_attention", "reconstruction_loss"),
    *(f"locfast/models/{name}.py" for name in ("attention", "backbone", "blocks", "decoder", "teacher")),
    "locfast/methods/maskembed.py",
]
DROPPED_SOURCES = [f"locfast/models/{name}.py" for name in ("attention", "backbone", "blocks")]
REGION_SOURCES = [*DROPPED_SOURCES, *(f"locfast/models/{name}.py" for name in ("prompter", "text_encoder"))]
FP8_SOURCES = ["quantize_rows", "locfast/models/fp8.py"]
"""What a step's time comes from: a table whose hashes differ is of older sources."""
VIEWS = 3
CHECKED = 4
"""Images on which two sides are compared."""
Build = Callable[[MaskEmbed], Side]
Found = dict[str, float]
SIDES: dict[str, Build] = {"locfast": locfast_side, "public": public_side}
COUNTED = {
    "teacher": ("teacher embedding", "teacher"),
    "encoder forward": ("encoder forward", "head forward"),
    "encoder backward": ("encoder backward", "head backward"),
    "decoder forward": ("decoder forward",),
    "decoder backward": ("decoder backward",),
}
"""The FLOPs of which parts a timed part does; the others do no matrix products."""
ENOUGH = 1.02
"""A larger micro-batch must gain more than this to be worth a try of the next."""
SPREAD = 0.02
"""How far two sides' losses and gradient norms may lie apart in bf16: both round to 2^-9 at every product."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--method", choices=["maskembed", *DROPPED, "cloc"], default="maskembed")
    options.add_argument("--only", nargs="+", help=f"these models alone: {', '.join([*CASES, *SMOKE])}")
    options.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    options.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    options.add_argument("--batch", type=int, help="this micro-batch alone, without a search")
    options.add_argument("--fp8", action="store_true", help="locfast's teacher in fp8")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--profile", action="store_true", help="print the kernels that take most of a step, too")
    args = options.parse_args()
    if args.method != "maskembed":
        if not args.smoke:
            args.out = args.out or RESULTS  # ratios of runs in turns are a claim on a CPU too
        sources = REGION_SOURCES if args.method == "cloc" else DROPPED_SOURCES
        bench = Bench(f"step_{args.method}", [*sources, f"locfast/methods/{args.method}.py"], args)
        bench.result.smoke = args.smoke
        if args.method == "cloc":
            measure_regions(bench, args.only)
        else:
            measure_dropped(bench, args.method, args.only)
        return bench.finish()
    if unknown := set(args.only or ()) - {*CASES, *SMOKE}:
        options.error(f"--only {' '.join(sorted(unknown))}: known are {', '.join([*CASES, *SMOKE])}")
    bench = Bench("step_fp8" if args.fp8 else "step", [*SOURCES, *(FP8_SOURCES if args.fp8 else [])], args)
    cases = {name: case for name, case in (SMOKE if bench.smoke else CASES).items() if name in (args.only or [name])}
    wanted: dict[str, Found] = {}
    for side in args.sides:  # all of one side first: where time runs out, a whole column stands
        for name, case in cases.items():
            if time.monotonic() > bench.deadline:
                bench.missed.append(f"{name}, {side}")
                continue
            try:
                measure(bench, name, case, SIDES[side], wanted, args)
            except Exception as error:  # out of memory at the smallest size, a compiler's failure: the others still run
                bench.add(Row(f"{name}, {precision(bench)}", "step", side, note=f"did not run: {first_line(error)}"))
            clear(bench.device)
    write_picture(bench.result.rows, bench.path.with_suffix(".svg"))
    bench.finish()


def measure(bench: Bench, name: str, case: Case, build: Build, wanted: dict[str, Found], args: Any) -> None:
    """Rows of one side of one model, eager and then compiled. Adds to `wanted` what the next side must find."""
    method = make(case, bench.device, args.fp8)
    side = build(method)
    found = look(side, method, CHECKED)
    compare(found, wanted.setdefault(name, found), side.name)
    size = args.batch or best_batch(side, method, case, bench)
    if "eager" in args.modes:
        report(bench, name, side, method, size, "", args)
    if "compiled" in args.modes and time.monotonic() < bench.deadline:
        eager = look(side, method, size)
        side.compile()
        compare(look(side, method, size), eager, f"{side.name} compiled")
        report(bench, name, side, method, size, " compiled", args)


def report(bench: Bench, name: str, side: Side, method: MaskEmbed, size: int, mode: str, args: Any) -> None:
    """The rows of a step and of its parts."""
    times, peak = time_steps(side, method, size, args.repeats)
    flops = step_flops(Shape.of(method), size, side.way)
    case, who = f"{name}, {precision(bench)}, micro-batch {size}", side.name + mode
    shape = {"B": size, "V": VIEWS, "T": method.teacher.num_tokens}
    note = f"{1e3 * size / statistics.median(times):.0f} images/s"
    bench.add(row(bench, case, "step", who, times, sum(flops.values()), shape, peak, note))
    for part, taken in time_parts(side, method, size, args.repeats).items():
        counted = sum(flops[key] for key in COUNTED.get(part, ()))
        bench.add(row(bench, case, part, who, taken, counted, shape))
    if args.profile:
        print(kernels(side, method, size))


def precision(bench: Bench) -> str:
    return "bf16" if bench.device.type == "cuda" else "fp32"


def make(case: Case, device: torch.device, fp8: bool = False) -> MaskEmbed:
    torch.manual_seed(0)
    config = MaskEmbedConfig(teacher_precision="fp8" if fp8 else "same")
    method = create_method("maskembed", config, model=case.model, pretrained=False, image_size=case.size, seed=0)
    assert isinstance(method, MaskEmbed)
    with torch.no_grad():
        torch.nn.init.normal_(method.head.weight, std=0.02)  # it starts at zero, and then no mistake would show
    return method.to(device)


def look(side: Side, method: MaskEmbed, size: int) -> Found:
    """Loss and gradient norm on `size` images."""
    images, draw = batch_of(method, size)
    loss = forward(side, images, draw)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in side.module.parameters() if p.grad is not None])
    side.optimizer.zero_grad(set_to_none=True)
    return {"loss": float(loss.detach()), "gradient norm": float(norm)}


def compare(found: Found, wanted: Found, who: str) -> None:
    """AssertionError where two ways to take a step differ by more than bf16 explains."""
    for what, value in found.items():
        assert abs(value / wanted[what] - 1) < SPREAD, (
            f"{who}: {what} is {value:.6g}, another step's {wanted[what]:.6g}"
        )


def best_batch(side: Side, method: MaskEmbed, case: Case, bench: Bench) -> int:
    """The micro-batch with the most images a second, eager: compiled steps take no more memory."""
    best, speed, size = 0, 0.0, case.smallest
    while True:
        try:
            times, _ = time_steps(side, method, size, 2)
        except torch.OutOfMemoryError:
            if not best:
                raise
            times = []
            side.forget()
        clear(bench.device)
        gain = 1e3 * size / statistics.median(times) / speed if times and speed else float(bool(times)) * 2
        if gain > 1:
            best, speed = size, 1e3 * size / statistics.median(times)
        if bench.smoke or gain < ENOUGH:
            return best
        size *= 2


def row(
    bench: Bench,
    case: str,
    direction: str,
    who: str,
    times: list[float],
    flops: int,
    shape: dict[str, int],
    peak: float | None = None,
    note: str = "",
) -> Row:
    low, _, _, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    median = statistics.median(times)
    rate = flops / median / 1e9 if flops else None
    ceiling = bench.result.ceilings.get("TFLOP/s")
    percent = 100 * rate / ceiling if rate and ceiling else None
    return Row(case, direction, who, median, low, high, rate, "TFLOP/s", percent, peak, note, shape)


def clear(device: torch.device) -> None:
    """Give memory back, and forget what was compiled: torch stops compiling after a number of forms."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
