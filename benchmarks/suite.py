"""Everything worth knowing on a GPU, in a fixed order of worth, within a budget of seconds.

Parity tests come first: a benchmark of an op whose tests fail would refuse to time it anyway. Each step's outcome is
appended to DIR/suite.jsonl as it ends, each table row is written as it is measured, and what the budget did not reach
is listed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from _results import RESULTS, ROOT

TO_FINISH = 20
"""Seconds between the last row that a benchmark starts and the end of its time: for that row, and for its summary."""


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    takes_options: bool = True
    """Whether the command understands --out and --budget."""
    share: float = 1.0
    """Of the time left, at most: so that tests, which take long to compile, leave some for measuring."""


TESTS = (
    *("-m", "pytest", "-v", "-p", "no:cacheprovider"),  # names as they come: a summary is lost where time runs out
    *(("-n", "auto") if importlib.util.find_spec("xdist") else ()),  # the time goes into compiling kernels
    *("--ignore=tests/kernels/test_sm_90.py", "--ignore=tests/kernels/test_launches.py"),  # need no GPU
    "tests/kernels",
    "tests/models/test_fp8.py",
    "tests/models/test_teacher_pass.py",
    "tests/methods/test_maskembed_step.py",
    "tests/methods/test_clip_stand_in.py",
    "tests/methods/test_exact_masks.py",
    "tests/engine/test_no_wait.py",
)
STEPS = (
    Step("parity", (*TESTS, "-m", "not slow"), takes_options=False, share=0.6),
    Step("attn_softcap", ("benchmarks/attn_softcap.py",), share=0.7),
    Step("region_loss", ("benchmarks/region_loss.py",), share=0.5),
    Step("mask_embeddings", ("benchmarks/mask_embeddings.py",), share=0.5),
    Step("select_views", ("benchmarks/select_views.py", "--who", "triton", "cuda"), share=0.5),
    Step("reconstruction_loss", ("benchmarks/reconstruction_loss.py",)),
    Step("teacher", ("benchmarks/teacher.py",), share=0.5),
    Step("step", ("benchmarks/step.py",)),
    Step("step_uta", ("benchmarks/step.py", "--method", "uta"), share=0.5),
    Step("step_lut", ("benchmarks/step.py", "--method", "lut"), share=0.5),
    Step("step_cloc", ("benchmarks/step.py", "--method", "cloc"), share=0.5),
    Step("region_share", ("benchmarks/region_loss.py", "--share"), share=0.5),
    Step("lut_forms", ("benchmarks/lut_forms.py",), share=0.5),
    Step("input", ("benchmarks/input.py",), share=0.5),
    Step("optimizers", ("benchmarks/optimizers.py",)),
    Step("product", (*TESTS, "-m", "slow"), takes_options=False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps alone")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all (default 480)")
    args = parser.parse_args()
    failed = run([step for step in STEPS if args.only is None or step.name in args.only], args.out, args.budget)
    sys.exit(1 if failed else 0)


def run(steps: list[Step], out: Path, budget: float) -> list[str]:
    """Run the steps; return the names of those that failed. Steps that the budget did not reach are not failures."""
    deadline = time.monotonic() + budget
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for step in steps:
        left = step.share * (deadline - time.monotonic())
        outcome, seconds = "not reached", 0.0
        if left > 0:
            print(f"== {step.name} (at most {left:.0f} s)", flush=True)
            command = [sys.executable, *step.command]
            if step.takes_options:
                command += ["--out", str(out.resolve()), "--budget", f"{max(1, left - TO_FINISH):.0f}"]
            start = time.monotonic()
            try:
                code = subprocess.run(command, cwd=ROOT, timeout=left).returncode
                outcome = "passed" if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                outcome = "cut off by the budget"
            seconds = time.monotonic() - start
        if outcome.startswith("failed"):
            failed.append(step.name)
        with (out / "suite.jsonl").open("a") as lines:
            lines.write(json.dumps({"step": step.name, "outcome": outcome, "seconds": round(seconds, 1)}) + "\n")
        print(f"== {step.name}: {outcome} after {seconds:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    main()
