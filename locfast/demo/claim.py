"""What the demo gains, over several seeds: the claim of docs/demo.md and the JSON behind it.

`python -m locfast.demo.claim --out benchmarks/results/cpu-demo/claim.json` runs the whole demo on seeds 10, 11 and 12,
each with scenes, labelled scenes, masks and heads of its own, and gives the mean gain with its 95 % t interval. The
demo's settings were chosen on other seeds (0, 1 and 2 for MaskEmbed, 0 for UTA, LUT and CLOC), so these had no part in
the choice. `--method uta`, `lut` or `cloc` claims for the demo of that method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from locfast.cli import command, parse_train
from locfast.config.registry import find_class
from locfast.demo import DEMOS
from locfast.errors import UserError

T_975 = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764, 6: 2.5706, 7: 2.4469, 8: 2.3646, 9: 2.3060, 10: 2.2622}
"""97.5 % quantile of Student's t with n - 1 degrees of freedom, by n."""


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and 95 % t interval of a few independent values."""
    mean, half = statistics.mean(values), T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": values}


def gains(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By head: recall before and after, and the gain with its interval, all in points (percent)."""
    found = {}
    for name in runs[0]["before"]:
        before, after = ([100 * run[when][name]["recall"] for run in runs] for when in ("before", "after"))
        gain = interval([new - old for old, new in zip(before, after, strict=True)])
        found[name] = {"before": statistics.mean(before), "after": statistics.mean(after), "gain": gain}
    return found


def figure_gains(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By figure of a demo.json: the mean of every side, and the gain over the baseline with its interval.

    Where there is a third side, `gain_over_teacher` is that over it (CLOC's is CLIP alone); a figure of the method
    alone has the interval of the figure itself.
    """
    found = {}
    for number, first in enumerate(runs[0]["figures"]):
        figures = [run["figures"][number] for run in runs]
        sides = [side for side in ("baseline", "ours", "teacher") if first[side] is not None]
        one: dict[str, Any] = {side: statistics.mean(f[side] for f in figures) for side in sides}
        for side, name in (("baseline", "gain"), ("teacher", "gain_over_teacher")):
            if side in sides:
                one[name] = interval([f["ours"] - f[side] for f in figures])
        if sides == ["ours"]:
            one["alone"] = interval([f["ours"] for f in figures])
        found[first["name"]] = one
    return found


def machine() -> dict[str, Any]:
    """Processor, threads, versions and commit: what belongs beside every figure."""
    import timm
    import torch

    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": commit or None,
        "dirty": dirty,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m locfast.demo.claim", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--runs", type=Path, default=Path("runs/claim"), help="folder for the run folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    args, flags = parser.parse_known_args()
    if len(args.seeds) not in T_975:
        raise UserError(f"--seeds: an interval needs 2 to {max(T_975)} seeds, got {len(args.seeds)}.")

    runs, method = [], parse_train(flags).method
    file = "probe.json" if method == "maskembed" else "demo.json"
    for seed in args.seeds:
        # A run that is complete is not run again: a killed claim goes on where it was.
        folder = args.runs / f"seed-{seed}"
        if not (folder / file).is_file():
            config = parse_train(["--seed", str(seed), "--out", str(folder), "--overwrite", *flags])
            find_class(DEMOS[method])(config)
        runs.append(json.loads((folder / file).read_text()))
    kept = ("seed", "scenes", "heads", "before", "after", "figures", "steps", "seconds", "seconds_in_all", "threads",
            "same_box_always")  # fmt: skip
    result = {
        "command": "python -m locfast.demo.claim " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "seeds": args.seeds,
        **({"recall": gains(runs)} if method == "maskembed" else {"columns": runs[0]["columns"]}),
        **({} if method == "maskembed" else {"figures": figure_gains(runs)}),
        "runs": [{key: run[key] for key in kept if key in run} for run in runs],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in result["recall" if method == "maskembed" else "figures"].items():
        shown = [f"{found[side]:6.2f}" for side in ("before", "baseline", "ours", "after", "teacher") if side in found]
        told = [found[key] for key in ("gain", "gain_over_teacher", "alone") if key in found]
        intervals = "   ".join(f"{one['mean']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})" for one in told)
        print(f"{name:40} {' '.join(shown)}   {intervals}")


if __name__ == "__main__":
    main()
