"""Two claims of the demo on the same seeds, side by side: what a change of settings does to the probe.

`python -m locfast.demo.compare benchmarks/results/cpu-demo/claim/teacher-{same,fp8}.json` prints, by head, recall after
alignment in both, and the mean difference over seeds with its 95 % t interval: pairs share scenes, labels and masks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from locfast.cli import command
from locfast.demo.claim import interval
from locfast.errors import UserError


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By head: mean recall after alignment in both claims, and the second less the first, in points.

    Raises UserError where the claims are of other seeds.
    """
    if first["seeds"] != second["seeds"]:
        raise UserError(
            f"the claims are of the seeds {first['seeds']} and {second['seeds']}; pairs need the same ones."
        )
    found = {}
    for name in first["recall"]:
        after = [[100 * run["after"][name]["recall"] for run in claim["runs"]] for claim in (first, second)]
        change = interval([new - old for old, new in zip(*after, strict=True)])
        found[name] = {"first": mean(after[0]), "second": mean(after[1]), "change": change}
    return found


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m locfast.demo.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("first", type=Path, help="JSON of locfast.demo.claim")
    parser.add_argument("second", type=Path, help="another, on the same seeds")
    args = parser.parse_args()
    claims = [json.loads(path.read_text(encoding="utf-8")) for path in (args.first, args.second)]
    print(f"| probe | {args.first.stem} | {args.second.stem} | change | 95 % interval |\n|---|---|---|---|---|")
    for name, one in differences(*claims).items():
        change = one["change"]
        print(
            f"| {name.replace('/', ', ')} head | {one['first']:.2f} | {one['second']:.2f} | {change['mean']:+.2f} "
            f"| {change['low']:+.2f} to {change['high']:+.2f} |"
        )


if __name__ == "__main__":
    main()
