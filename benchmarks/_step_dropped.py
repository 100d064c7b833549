"""What dropping tokens saves of a UTA or LUT step: time beside FLOPs, against the same backbone on every token.

A backbone's forward and backward pass on all patches, and on those that the method keeps, are timed one after the other
within every repeat; so are whole training steps of the method. Weights are random and images are noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _harness import Bench
from _results import Row
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from locfast.config.registry import method_config_class
from locfast.methods import create_method
from locfast.methods.base import Method
from locfast.random import Keys

CASES = {
    "uta": {
        "B/14@224": ("eva02_base_patch14_224", {"teacher": "eva_giant_patch14_clip_224"}, 256),
        "L/14@224": ("eva02_large_patch14_224", {"teacher": "eva_giant_patch14_clip_224"}, 128),
    },
    "lut": {"B/16@224": ("vit_base_patch16_224", {}, 256), "L/16@224": ("vit_large_patch16_224", {}, 128)},
}
"""Method -> case -> backbone, the method's own fields, micro-batch on a GPU."""
ON_CPU = {
    "uta": {"B/16@224": ("eva02_base_patch16_clip_224", {"teacher": "vit_small_patch16_224"}, 4)},
    "lut": {"S/16@224": ("vit_small_patch16_224", {}, 8)},
}
"""A small teacher: EVA-01's giant has no place here."""
SMOKE = {
    "uta": {"T/16@224": ("vit_tiny_patch16_224", {"teacher": "vit_tiny_patch16_224"}, 8)},
    "lut": {"T/16@224": ("vit_tiny_patch16_224", {"decoder_width": 192, "decoder_depth": 2, "decoder_heads": 3}, 8)},
}
REPEATS = 9


def measure(bench: Bench, method_name: str, only: list[str] | None) -> None:
    """Rows of one method's cases: the backbone on all tokens and on kept ones, and the whole step."""
    cases = SMOKE if bench.result.smoke else ON_CPU if bench.device.type == "cpu" else CASES
    for name, (model, fields, size) in cases[method_name].items():
        if name not in (only or [name]):
            continue
        if time.monotonic() > bench.deadline:
            bench.missed.append(name)
            continue
        config = method_config_class(method_name)(**fields)
        with bench.device:  # the random weights of a giant take a CPU longer than everything else here
            method = create_method(method_name, config, model=model, pretrained=False).to(bench.device)
        batch, draw = batch_of(method, size)
        kept = int(shown(draw)[0].sum())
        timed(bench, f"{name}, B {size}, kept {kept}", passes(method, batch, draw))
        del method


def passes(method: Method, batch: dict[str, Any], draw: Any) -> dict[str, Callable[[], object]]:
    """What is timed: {"backbone, all tokens", "backbone, kept tokens", "step"}, each one forward and backward."""
    backbone = method.artifacts()["backbone"]
    images = next(iter(batch["views"].values()))
    visible = shown(draw)
    kept = visible.nonzero()[:, 1].view(len(visible), -1)
    bf16 = images.is_cuda

    def run(kept: Tensor | None) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            tokens = backbone.forward_features(images, kept=kept)
        tokens.float().square().mean().backward()

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = method(batch, draw)["loss"]
        loss.backward()

    return {"backbone, all tokens": lambda: run(None), "backbone, kept tokens": lambda: run(kept), "step": step}


def shown(draw: Any) -> Tensor:
    """Which patches a draw lets the backbone see, [B, N] bool; of several views, the first's."""
    return draw.visible if draw.visible.ndim == 2 else draw.visible[:, 0]


def timed(bench: Bench, case: str, runs: dict[str, Callable[[], object]]) -> None:
    """One row each, of runs in turns; kept tokens get a note: their shares of the time and of the FLOPs."""
    flops = {}
    for who, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            run()
        flops[who] = counter.get_total_flops()
    times: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(REPEATS):
        for who, run in runs.items():
            times[who].append(once(run, bench.device))
    whole, some = "backbone, all tokens", "backbone, kept tokens"
    for who, values in times.items():
        ms = statistics.median(values)
        low, _, _, high = statistics.quantiles(values, n=5, method="inclusive")
        note = ""
        if who == some:
            time_share, flop_share = ms / statistics.median(times[whole]), flops[who] / flops[whole]
            note = f"{time_share:.2f} of the time, {flop_share:.2f} of the FLOPs: {time_share / flop_share:.2f}"
        rate = flops[who] / ms / 1e9
        ceiling = bench.result.ceilings.get("TFLOP/s")
        percent = 100 * rate / ceiling if ceiling else None
        bench.add(Row(case, "both", who, ms, low, high, rate, "TFLOP/s", percent, None, note))


def once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one run, which takes a GPU so long that what its host and its caches do beside hardly counts."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def batch_of(method: Method, size: int) -> tuple[dict[str, Any], Any]:
    """Noise for every view that the method wants, and its own draws."""
    generator = torch.Generator(method.device).manual_seed(0)
    views = {
        name: torch.randn(size, 3, *view.size, generator=generator, device=method.device)
        for name, view in method.image_spec().views.items()
    }
    index = torch.arange(size, device=method.device)
    return {"views": views}, method.draw(Keys(0, torch.zeros_like(index), index))
