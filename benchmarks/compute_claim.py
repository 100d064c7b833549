"""How much of its backbone's pre-training a MaskEmbed run costs, in samples, FLOPs and, where measured, GPU-hours.

Prints the table and writes docs/compute.md and docs/compute.svg (`--check`: change nothing, say whether they are up to
date). Needs neither weights nor a GPU: networks lie on the meta device. Another number of `--steps` is only printed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import _claim_page
import _claim_plot
import torch
from _pretraining import PRETRAINING, Pretraining
from _results import RESULTS, ROOT, Measurement
from _step_flops import Shape, Way, step_flops, teacher_linear_flops

from locfast.config.files import from_dict, read_recipe
from locfast.config.maskembed import MaskEmbedConfig
from locfast.config.registry import run_config_class
from locfast.methods import create_method

PAGE, PICTURE = ROOT / "docs" / "compute.md", ROOT / "docs" / "compute.svg"
STEPS = 60_000
"""Of a published run: five epochs of ImageNet-21k at batch 1024 (Locality Alignment, section 4.2)."""
FP8_COST = 0.5
"""Of an fp8 FLOP beside one in bf16: its data-sheet rate on Hopper is twice bf16's."""
LIMIT = 0.01


@functools.cache
def shape_of(architecture: str, image_size: int | None, config: MaskEmbedConfig) -> Shape:
    """The shapes of MaskEmbed's networks on timm's `architecture`: several recipes share one."""
    with torch.device("meta"):
        method = create_method("maskembed", config, model=architecture, pretrained=False, image_size=image_size)
    return Shape.of(method)


@dataclass(frozen=True)
class Run:
    """What a recipe computes."""

    recipe: str
    model: str
    shape: Shape
    batch: int
    micro_batch: int

    @staticmethod
    def of(recipe: str) -> Run:
        """Reads the recipe and builds its networks on the meta device. Raises UserError for a name that is none."""
        values = read_recipe(recipe)
        config = from_dict(run_config_class(values["method"]), values, recipe)
        shape = shape_of(config.model.partition(".")[0], config.image_size, config.maskembed)
        return Run(recipe, config.model, shape, config.batch_size, config.micro_batch)

    def parts(self, way: Way) -> dict[str, float]:
        """FLOPs an image, by part of the step."""
        counted = step_flops(self.shape, self.micro_batch, way)
        return {part: flops / self.micro_batch for part, flops in counted.items()}

    def flops(self, way: Way, fp8_teacher: bool = False) -> float:
        """FLOPs a step; `fp8_teacher` weighs those of the teacher's linear layers with FP8_COST."""
        total = sum(self.parts(way).values())
        if fp8_teacher:
            total -= (1 - FP8_COST) * teacher_linear_flops(self.shape, self.micro_batch, way) / self.micro_batch
        return total * self.batch


@dataclass(frozen=True)
class Claim:
    """A run beside one account of its backbone's pre-training."""

    run: Run
    before: Pretraining
    steps: int

    @property
    def name(self) -> str:
        return f"{self.run.recipe} at {self.before.case}" if self.before.case else self.run.recipe

    @property
    def is_of_the_paper(self) -> bool:
        """The paper says "less than 1 %" of CLIP and SigLIP alone."""
        return self.run.recipe.startswith(("clip_", "siglip_"))

    @property
    def samples(self) -> float:
        """Images of the run over samples of the pre-training."""
        return self.steps * self.run.batch / self.before.samples

    def flops(self, way: Way = "locfast", fp8_teacher: bool = False) -> float:
        """FLOPs of the run over those of the pre-training."""
        return self.steps * self.run.flops(way, fp8_teacher) / self.before.flops(self.run.shape)

    @property
    def most_steps(self) -> int:
        """The largest number of steps that stays under 1 % in FLOPs."""
        steps = int(LIMIT * self.before.flops(self.run.shape) / self.run.flops("locfast"))
        return steps - (steps * self.run.flops("locfast") >= LIMIT * self.before.flops(self.run.shape))


def claims(steps: int = STEPS) -> list[Claim]:
    """Every recipe of the paper's, and every account of its pre-training."""
    return [Claim(run, before, steps) for run in map(Run.of, PRETRAINING) for before in PRETRAINING[run.recipe]]


def measured(run: Run, results: Path = RESULTS) -> Iterator[tuple[str, str, float]]:
    """(GPU, who, images/s) of locfast's measured steps; smoke tests are passed over.

    They are the rows "step" of <gpu>/step*.json whose `case`, up to a comma, is the recipe's name, and whose `who`
    begins with locfast.
    """
    for path in sorted(results.glob("*/step*.json")):
        measurement = Measurement.read(path)
        for row in [] if measurement.smoke else measurement.rows:
            ours = row.who.startswith("locfast") and row.case.split(",")[0] == run.recipe
            if ours and row.direction == "step" and row.ms:
                yield measurement.machine["gpu"], row.who, 1e3 * row.shape["B"] / row.ms


def gpu_hours(claim: Claim, results: Path = RESULTS) -> str:
    """On every GPU that ran this step; "not measured" where none did."""
    images = claim.steps * claim.run.batch
    told = [f"{images / rate / 3600:.0f} ({gpu}, {who})" for gpu, who, rate in measured(claim.run, results)]
    return "; ".join(told) or "not measured"


def render(found: list[Claim], results: Path = RESULTS) -> tuple[str, str]:
    """The page as Markdown, and its picture."""
    hours = [gpu_hours(claim, results) for claim in found]
    lines = [
        (
            claim.name,
            {
                "samples": 100 * claim.samples,
                "FLOPs, locfast": 100 * claim.flops(),
                "FLOPs, fp8 teacher": 100 * claim.flops(fp8_teacher=True),
            },
        )
        for claim in found
    ]
    return _claim_page.page(found, hours, FP8_COST), _claim_plot.svg(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is out of date")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the run; default {STEPS}, as published")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: a run has at least one step")
    if args.check and args.steps != STEPS:
        parser.error(f"--check compares the page, which is for {STEPS} steps: leave --steps out")
    found = claims(args.steps)
    if args.steps != STEPS:
        print("\n".join(_claim_page.shares(found, [gpu_hours(claim) for claim in found])))
        return
    page, picture = render(found)
    if not args.check:
        PAGE.write_text(page)
        PICTURE.write_text(picture)
        print("\n".join(_claim_page.shares(found, [gpu_hours(claim) for claim in found])))
        print(f"written to {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")
    elif not (PAGE.is_file() and PAGE.read_text() == page and PICTURE.is_file() and PICTURE.read_text() == picture):
        sys.exit("docs/compute.md or docs/compute.svg is out of date: run python benchmarks/compute_claim.py")


if __name__ == "__main__":
    main()
