"""What regions cost in a CLOC step: beside CLIP's step on the same towers, and by the way that prompts are computed.

Forward and backward pass of whole steps, one after the other within every repeat. Weights are random, images are
noise; captions have the length that CLOC's data has (35 tokens, table 1), phrases two words, M regions an image.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Bench, peak_memory
from _results import Row
from _step_dropped import once
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from locfast.config.cloc import ClocConfig
from locfast.data.spec import Geometry, Record, Region
from locfast.methods.clip import IMAGE, Clip
from locfast.methods.cloc import Cloc
from locfast.models.prompter import Asked, CrossPrompter, Prompter, RoiPooler
from locfast.random import Keys

CASES = {
    "B/16@224": ("vit_base_patch16_clip_224", "ViT-B-16", 224, 256),
    "L/14@336": ("vit_large_patch14_clip_336", "ViT-L-14", 336, 64),
    "H/14@336": ("vit_huge_patch14_clip_336", "ViT-H-14", 336, 32),
}
"""Case -> timm's name, open_clip's (whose text tower it takes), pixels of a side, images of a micro-batch on a GPU."""
ON_CPU = {"B/16@224": ("vit_base_patch16_clip_224", "ViT-B-16", 224, 4)}
SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
CAPTION, REPEATS = 33, 7
WORDS = ("red", "old", "small", "tall", "kite", "tower", "boat", "lamp", "dog", "cup", "street", "tree")
AGREE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far losses may lie apart: the ways are equal but for rounding."""


class Operations(TorchDispatchMode):
    """Counts what a host has to launch: operations that write a tensor of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function._schema.returns
        self.count += not any(one.alias_info is not None and not one.alias_info.is_write for one in returned)
        return function(*args, **(kwargs or {}))


class PromptByPrompt(Prompter):
    """The same weights as the paper has it: every prompt takes all tokens through the whole block."""

    def _image(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return ()

    def _prompt(self, asked: Asked, prompt: Tensor, rows: Tensor | None) -> Tensor:
        tokens = torch.cat([prompt, asked.of(rows).tokens], 1)
        query, key, value = (part[:, None] for part in self.qkv(self.norm1(tokens)).chunk(3, -1))
        tokens = tokens + self.proj(F.scaled_dot_product_attention(query, key, value)[:, 0])
        tokens = tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return self.project(tokens.float().mean(1))


def measure(bench: Bench, only: list[str] | None) -> None:
    """Rows of every case: CLIP's step, and CLOC's with each prompter."""
    smoke = {"T/16@64": ("vit_tiny_patch16_224", small_text(), 64, 8)}
    cases = smoke if bench.result.smoke else ON_CPU if bench.device.type == "cpu" else CASES
    for name, (model, text, side, size) in cases.items():
        if name not in (only or [name]):
            continue
        if time.monotonic() > bench.deadline:
            bench.missed.append(name)
            continue
        config = ClocConfig(text=text, projection="new")
        method = Cloc(config, model=model, pretrained=False, image_size=side)
        method.to(bench.device)
        batch = batch_of(size, side, bench.device)
        draw = method.draw(Keys(0, torch.zeros(size, dtype=torch.int64), torch.arange(size)))
        compare(bench, f"{name}, B {size}, M {config.regions}", ways(method, batch, draw))
        del method


def small_text() -> str:
    file = Path(tempfile.mkdtemp()) / "locfast-smoke.json"
    vision = {"image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    file.write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": SMALL_TEXT}))
    return str(file)


def batch_of(size: int, side: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    word = torch.randint(len(WORDS), (size, CAPTION), generator=generator).tolist()
    corners = (torch.rand(size, 8, 2, 2, generator=generator).sort(2).values * side * 0.8).tolist()
    records = [
        Record(
            b"",
            text=" ".join(WORDS[w] for w in words),
            regions=tuple(
                Region((x, y, x1 + 0.2 * side, y1 + 0.2 * side), f"{WORDS[words[2 * i]]} {WORDS[words[2 * i + 1]]}")
                for i, ((x, y), (x1, y1)) in enumerate(own)
            ),
        )
        for words, own in zip(word, corners, strict=True)
    ]
    frame = torch.tensor([[0.0, 0.0, side, side]]).expand(size, 4)
    sizes = torch.full((size, 2), side)
    geometry = Geometry(frame, frame, torch.zeros(size, dtype=torch.bool), sizes, (side, side))
    images = torch.randn(size, 3, side, side, generator=generator).to(device)
    return {"views": {IMAGE: images}, "geometry": {IMAGE: geometry}, "records": records}


def ways(method: Cloc, batch: dict[str, Any], draw: Any) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name: forward and backward pass, giving the loss."""
    width, joint, device = method.prompter.project.in_features, method.text.joint_width, method.device
    own = method.prompter
    plain, cross = PromptByPrompt(width, joint).to(device), CrossPrompter(width, joint).to(device)
    plain.load_state_dict(own.state_dict())
    grid = method.image.backbone.grid
    roi = RoiPooler(width, joint, grid, size=method.config.roi_size).to(device)

    def step(prompter: Prompter | CrossPrompter | RoiPooler | None) -> Tensor:
        if prompter is not None:
            method.prompter = prompter
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            told = Clip.forward(method, batch, draw.caption) if prompter is None else method(batch, draw)
        told["loss"].backward()
        method.zero_grad(set_to_none=True)
        return told["loss"].detach()

    # RoI-align takes no phrase, so that its step has no grounding
    kinds = {"CLIP": None, "CLOC": own, "CLOC, prompt by prompt": plain, "CLOC, cross": cross, "CLOC, roi": roi}
    return {name: (lambda kind=kind: step(kind)) for name, kind in kinds.items()}


def compare(bench: Bench, case: str, runs: dict[str, Callable[[], Tensor]]) -> None:
    """One row each, of runs in turns, with the time in units of CLIP's step. AssertionError where two ways differ."""
    flops, operations, peaks, losses = {}, {}, {}, {}
    for who, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            losses[who] = float(run())
        with Operations() as queued:
            run()
        flops[who], operations[who] = counter.get_total_flops(), queued.count
        peaks[who] = peak_memory(run, bench.device)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    apart = abs(losses["CLOC"] / losses["CLOC, prompt by prompt"] - 1)
    assert apart < AGREE[dtype], f"prompt by prompt the loss is another: {losses}"
    times: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(REPEATS):
        for who, run in runs.items():
            times[who].append(once(run, bench.device))
    alone = statistics.median(times["CLIP"])
    for who, values in times.items():
        ms = statistics.median(values)
        low, _, _, high = statistics.quantiles(values, n=5, method="inclusive")
        share = f"{ms / alone:.2f} of CLIP's time, {flops[who] / flops['CLIP']:.2f} of its FLOPs"
        note = f"{share}, {operations[who]} operations"
        rate, ceiling = flops[who] / ms / 1e9, bench.result.ceilings.get("TFLOP/s")
        percent = 100 * rate / ceiling if ceiling else None
        bench.add(Row(case, "both", who, ms, low, high, rate, "TFLOP/s", percent, peaks[who], note))
