"""How long does the frozen teacher take on three masked views, in bf16 and in fp8, and how far are its targets off?

Times `Backbone.masked_features` without gradients under bf16 autocast, with random weights; then, for one model, the
products it is made of. Before a row is timed, its targets are compared with fp32's: fp8 may be off twice as far as the
same quantised products in fp32, bf16 by its roundings. Errors after every block go to <gpu>/teacher_error/<model>.json.
`--demo` takes no time and measures those errors on the demo's trained teacher and its scenes, on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _harness import Bench, command, first_line, machine, num_bytes, parser
from _results import RESULTS, commit, slug
from _teacher_error import error, errors
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from locfast.kernels.quantize_rows import quantize_rows
from locfast.models import fp8
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.blocks import is_known_block
from locfast.models.compiled import compile_blocks
from locfast.models.teacher import CapturedPass

VIEWS = 3
MODELS = {  # timm name, images
    "B/16@224": ("vit_base_patch16_clip_quickgelu_224.openai", 64),
    "L/14@336": ("vit_large_patch14_clip_quickgelu_336.openai", 32),
    "SO400M/14@384": ("vit_so400m_patch14_siglip_384.webli", 16),
}
SMOKE = {"smoke": ("vit_tiny_patch16_224", 2)}
SOURCES = [
    *("quantize_rows", "select_views"),
    *(f"locfast/models/{name}.py" for name in ("attention", "backbone", "blocks", "fp8")),
]
CHECKED = 2
"""Images that a check compares."""


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="these models alone")
    known.add_argument("--batch", type=int, help="images, of every model (default 64, 32, 16)")
    known.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs too")
    known.add_argument("--products", choices=[*MODELS, "none"], default="L/14@336", help="whose products to time")
    known.add_argument("--demo", action="store_true", help="errors of the demo's teacher instead, on a CPU")
    args = known.parse_args()
    if args.demo:
        demo(args)
        return
    bench = Bench("teacher", SOURCES, args)
    models = SMOKE if bench.smoke else {name: MODELS[name] for name in args.only}
    try:
        import torchao  # noqa: F401
    except Exception as problem:  # a build for another torch raises more than ImportError
        bench.absent("torchao fp8 compiled", f"not installed: {first_line(problem)}")
    for name, (model, batch) in models.items():
        run_model(bench, name, model, args.batch or batch, args.graph)
    if args.products != "none":
        run_products(bench, *next(((n, m[1]) for n, m in models.items() if n == args.products), ("smoke", 2)))
    bench.finish()


def run_model(bench: Bench, name: str, model: str, batch: int, graph: bool) -> None:
    """All rows of one model, and its errors."""
    exact = load(model, bench).to(bench.device)
    stop = exact.depth - 1
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *exact.image_size, generator=generator).to(bench.device)
    visible = (torch.rand(batch, VIEWS, exact.num_patches, generator=generator) < 0.5).to(bench.device)
    few = images[:CHECKED], visible[:CHECKED]
    quantised = fp8.quantise_blocks(copy.deepcopy(exact), stop)
    slow = fp8.quantise_blocks(copy.deepcopy(exact), stop, fast_accum=False)
    truth = features(exact, *few, bf16=False)
    with dequantised():
        forced = error(features(quantised, *few), truth)["relative"]
    # Norm, QKV, probabilities, attention, projection, norm, activation and output are each rounded to 8 bits, a random
    # walk along the blocks.
    rounding = 2**-9 * math.sqrt(8 * stop)
    with FlopCounterMode(display=False) as counter:
        features(exact, images, visible)
    case = f"{name}, B {batch}, V {VIEWS}, {stop} blocks"

    def row(who: str, backbone: Backbone, bound: float, captured: bool = False) -> None:
        run: Callable[[], Any] = functools.partial(features, backbone, images, visible)

        def check() -> str:
            nonlocal run
            # the first images of the very run that is timed: another batch would be compiled once more
            found = error(run()[:CHECKED], truth)
            assert found["relative"] <= bound, f"targets are {found['relative']:.2%} off, allowed {bound:.2%}"
            if captured:  # the product's own graph, with its copy of the inputs
                graphed = CapturedPass(functools.partial(features, backbone, cache=False), images, visible)
                run = functools.partial(graphed, images, visible)
            return f"targets {found['relative']:.2%} off, cosine {found['cosine']:.6f}"

        shape = {"B": batch, "V": VIEWS, "T": exact.num_tokens, "C": exact.embed_dim}
        flops = counter.get_total_flops()
        bench.measure(case, "forward", who, lambda: run(), check, amount=flops, unit="TFLOP/s", shape=shape)

    kinds: list[tuple[str, Backbone, float]] = [("bf16", exact, rounding), ("fp8", quantised, 2 * forced + rounding)]
    for mode in ("", " compiled"):
        for kind, backbone, bound in kinds:
            if mode:
                compile_blocks(backbone, is_known_block)
            who = f"locfast {kind}{mode}"
            row(who, backbone, bound)
            if graph and bench.device.type == "cuda":
                row(f"{who} graph", backbone, bound, captured=True)
    row("locfast fp8, exact sums", slow, 2 * forced + rounding)
    if other := torchao_backbone(bench, exact, stop):
        compile_blocks(other, is_known_block)
        row("torchao fp8 compiled", other, 2 * forced + rounding)
    found = {kind: errors(exact, backbone, *few, stop, bf16=True) for kind, backbone, _ in kinds}
    write_errors(bench.out / slug(bench.result.machine["gpu"]), name, model, found, bench.device)


def load(model: str, bench: Bench) -> Backbone:
    small: dict[str, Any] = {"depth": 3, "embed_dim": 64, "num_heads": 2, "img_size": 64} if bench.smoke else {}
    return load_backbone(model, pretrained=False, **small).eval().requires_grad_(False)


@torch.no_grad()
def features(backbone: Backbone, images: Tensor, visible: Tensor, bf16: bool = True, cache: bool = True) -> Tensor:
    """The targets. `cache`: keep weights that autocast has cast; a graph must hold the casts itself."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16, cache_enabled=cache):
        return backbone.masked_features(images, visible)


@contextlib.contextmanager
def dequantised() -> Iterator[None]:
    """The quantised products in fp32, on any device: what fp8 forces on the targets, whatever multiplies."""

    def product(x, x_scale, weight, weight_scale, bias, dtype, fast_accum):
        return fp8.dequantised_linear(x, x_scale, weight, weight_scale, bias, dtype)

    with mock.patch.object(fp8, "fp8_linear", product):
        yield


def torchao_backbone(bench: Bench, exact: Backbone, stop: int) -> Backbone | None:
    """The same teacher by torchao, where that is installed: weights bf16 there, as it wants them."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except Exception:
        return None
    backbone = copy.deepcopy(exact)
    try:
        for block in list(backbone.blocks)[:stop]:
            quantize_(block.to(torch.bfloat16), Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    except Exception as problem:
        bench.absent("torchao fp8 compiled", f"did not run: {first_line(problem)}")
        return None
    return backbone


def run_products(bench: Bench, name: str, batch: int) -> None:
    """The four products of a block in bf16 and fp8, and the quantisation before one."""
    backbone = load(MODELS.get(name, SMOKE["smoke"])[0], bench).to(bench.device)
    rows = batch * VIEWS * backbone.num_tokens
    block: Any = backbone.blocks[0]
    for what, linear in (
        ("qkv", block.attn.qkv),
        ("proj", block.attn.proj),
        ("fc1", block.mlp.fc1),
        ("fc2", block.mlp.fc2),
    ):
        case = f"{name} {what} [{rows}, {linear.in_features}] x [{linear.out_features}]"
        x = torch.randn(rows, linear.in_features, device=bench.device, dtype=torch.bfloat16)
        weight, bias = linear.weight.bfloat16(), linear.bias.bfloat16()
        (codes, scale), (w_codes, w_scale) = quantize_rows(x), quantize_rows(linear.weight.detach())
        operands = (codes, scale, w_codes, w_scale, bias, torch.bfloat16)
        exact = fp8.dequantised_linear(*operands[:-1], torch.float32)
        plain = torch.nn.functional.linear(x.float(), linear.weight, linear.bias)

        def check(run: Callable[[], Tensor], against: Tensor, allowed: float) -> str:
            off = error(run(), against)["relative"]
            assert off <= allowed, f"{off:.2%} off, allowed {allowed:.2%}"
            return f"{off:.3%} off its operands' product"

        flops = 2 * rows * linear.in_features * linear.out_features
        timed = {
            "torch bf16": (functools.partial(torch.nn.functional.linear, x, weight, bias), plain, 2**-8),
            # 14 bits of the sum are kept, and 2^-13 of it lost with each 32 products, or with each 4 of 32
            "locfast fp8": (
                functools.partial(fp8.fp8_linear, *operands, True),
                exact,
                2**-8 + linear.in_features / 32 * 2**-13,
            ),
            "locfast fp8, exact sums": (functools.partial(fp8.fp8_linear, *operands, False), exact, 2**-8 + 4 * 2**-13),
        }
        for who, (run, against, allowed) in timed.items():
            run_check = functools.partial(check, run, against, allowed)
            bench.measure(case, "forward", who, run, run_check, amount=flops, unit="TFLOP/s")
        for dtype in (torch.float32, torch.bfloat16):
            source = x.to(dtype)
            bench.measure(
                f"{case}, quantize {str(dtype).removeprefix('torch.')}",
                "forward",
                "locfast quantize_rows",
                functools.partial(quantize_rows, source),
                functools.partial(same_bits, source),
                amount=num_bytes(source, codes, scale),
                unit="GB/s",
            )


def same_bits(x: Tensor) -> None:
    for found, wanted in zip(quantize_rows(x), quantize_rows(x, backend="reference"), strict=True):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), "bits differ from the reference's"


def demo(args: argparse.Namespace) -> None:
    """The demo's trained teacher on its scenes: errors of bf16, and of fp8 in an fp32 run and in a bf16 run."""
    from locfast.data.scenes import SceneSource

    count = 8 if args.smoke else 256
    exact = load_backbone("demo").eval().requires_grad_(False)
    stop = exact.depth - 1
    pixels, _ = SceneSource(count, seed=10).tensors(0, count)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (exact.mean, exact.std))
    images = (pixels.float() / 255 - mean) / std
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(count, 1, exact.num_patches, generator=generator)
    visible = shown < torch.rand(count, 1, 1, generator=generator)
    visible = torch.cat([visible, ~visible, torch.ones_like(visible)], dim=1)
    quantised = fp8.quantise_blocks(copy.deepcopy(exact), stop)
    found = {
        "bf16": errors(exact, exact, images, visible, stop, bf16=True),
        "fp8": errors(exact, quantised, images, visible, stop, bf16=True),
        "fp8 in fp32": errors(exact, quantised, images, visible, stop, bf16=False),
    }
    folder = (args.out or RESULTS) / "cpu-demo"
    write_errors(folder, "demo", f"demo, {count} scenes", found, torch.device("cpu"))


def write_errors(
    folder: Path, name: str, model: str, found: dict[str, list[dict[str, float]]], device: torch.device
) -> None:
    """One JSON a model, and a line for each kind."""
    head, dirty = commit()
    path = folder / "teacher_error" / f"{slug(name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "command": command(),
        "machine": machine(device),
        "commit": head,
        "dirty": dirty,
        "model": model,
    }
    told["errors"] = {kind: {"blocks": values[:-1], "targets": values[-1]} for kind, values in found.items()}
    path.write_text(json.dumps(told, indent=1) + "\n")
    for kind, values in found.items():
        blocks, last = ", ".join(f"{one['relative']:.2%}" for one in values[:-1]), values[-1]
        print(f"{name}, {kind}: off after each block {blocks}")
        print(f"{name}, {kind}: targets {last['relative']:.2%} off, cosine {last['cosine']:.6f}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
