"""The command: one report for every folder given."""

from __future__ import annotations

import argparse
from pathlib import Path

from locfast.cli import command
from locfast.report import write_report


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m locfast.report",
        description="Write report.html anew into the folder of a run, a probe, a comparison or an analysis.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="e.g. runs/maskembed-demo")
    for folder in parser.parse_args().folders:
        print(write_report(folder))


if __name__ == "__main__":
    main()
