"""What the demos of UTA, LUT and CLOC share: figures of ways to train, in a table, in demo.json, in a report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from locfast.config.base import TrainConfig
from locfast.config.files import default_out
from locfast.engine.run_folder import RunFolder
from locfast.errors import UserError
from locfast.report import write_report

FILE = "demo.json"


@dataclass(frozen=True)
class Figure:
    """One figure, in percent, of the method, of its baseline, and of a third to compare with, for UTA the teacher.

    None where the figure has no meaning.
    """

    name: str
    baseline: float | None
    ours: float | None
    teacher: float | None = None


def check_out(config: TrainConfig) -> Path:
    """The run folder of a demo of several runs, the others inside the first's. Raises UserError as a run does."""
    out = Path(config.out or default_out(config.method, config.model))
    if config.resume:
        raise UserError(
            "--resume: the demo trains several runs and measures them; it cannot go on half-way. Give --overwrite, or "
            f"go on with one run alone by naming its data: --resume --out {out} --data demo:4096."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the demo runs in one process. Leave torchrun out, or name --data demo:4096 to train alone.")
    RunFolder(out).check(resume=False, overwrite=config.overwrite)
    return out


def finish(
    path: Path,
    config: TrainConfig,
    console: Console,
    figures: Sequence[Figure],
    columns: tuple[str, ...],
    more: dict[str, Any],
    seconds: float,
) -> Path:
    """Write demo.json and the report, print the table; gives `path`. columns: what baseline, ours, teacher are."""
    result = {
        "format": 1,
        "method": config.method,
        "seed": config.seed,
        "columns": list(columns),
        "figures": [asdict(figure) for figure in figures],
        **more,
        "seconds_in_all": round(seconds, 1),
    }
    aside = path / f".{FILE}"
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path / FILE)
    report = write_report(path)
    console.print(table(result))
    console.print(f"{seconds:.0f} s in all. Loss curve: {report}", soft_wrap=True)
    return path


def table(result: dict[str, Any]) -> Table:
    """The figures side by side, in percent."""
    shown = Table(title="On held-out scenes, %")
    for column in ("", *result["columns"], "gain"):
        shown.add_column(column, justify="left" if not column else "right")
    for figure in result["figures"]:
        told = [figure["baseline"], figure["ours"], *([figure["teacher"]] if len(result["columns"]) > 2 else [])]
        gain = "" if figure["baseline"] is None else f"{figure['ours'] - figure['baseline']:+.2f}"
        shown.add_row(figure["name"], *("" if value is None else f"{value:.2f}" for value in told), gain)
    return shown
