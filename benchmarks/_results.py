"""What a measurement is and where it lies: benchmarks/results/<gpu>/<benchmark>.json. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1


@dataclass
class Row:
    """One line of a table: who did what in how long."""

    case: str
    """Shapes and dtype, e.g. "L/14@336, B 64, bf16"."""
    direction: str
    """forward, backward, or both in one."""
    who: str
    """The implementation: "locfast triton", "eager", ..."""
    ms: float | None = None
    """Median over repeats, with the 20th and 80th percentiles; None where it did not run."""
    ms_p20: float | None = None
    ms_p80: float | None = None
    rate: float | None = None
    """Achieved rate in `unit`."""
    unit: str = ""
    """GB/s or TFLOP/s."""
    percent: float | None = None
    """Of the ceiling measured in the same run."""
    peak_mib: float | None = None
    """Memory allocated at the peak, beyond the inputs; of a backward: with its forward."""
    note: str = ""
    """Why it did not run or was refused, or what to know beside the time."""
    shape: dict[str, int] = field(default_factory=dict)
    """What was run, by the letters of the design: {"B": 64, "H": 16, "T": 577, "D": 64}."""


@dataclass
class Measurement:
    """A benchmark's table with everything needed to judge it later."""

    benchmark: str
    machine: dict[str, str]
    sources: dict[str, str]
    """Hash of the sources of every op (or file of one) that was measured, by name."""
    commit: str
    dirty: bool
    date: str
    ceilings: dict[str, float] = field(default_factory=dict)
    """Measured in the same run: "GB/s" of a large copy, "TFLOP/s" of a large bf16 matmul."""
    rows: list[Row] = field(default_factory=list)
    command: str = ""
    """What to type to measure this again."""
    smoke: bool = False
    """Small shapes, three repeats: shows that the script runs, and claims nothing."""
    schema: int = SCHEMA

    def path(self, folder: Path) -> Path:
        """Where it lies within a folder of results."""
        return folder / slug(self.machine["gpu"]) / f"{self.benchmark}.json"

    def write(self, folder: Path) -> Path:
        """Write to folder/<gpu>/<benchmark>.json, whole or not at all."""
        path = self.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(aside, path)
        return path

    @staticmethod
    def read(path: Path) -> Measurement:
        """Raises ValueError for a file of another schema."""
        values = json.loads(path.read_text())
        if values.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema {values.get('schema')}, wanted {SCHEMA}; measure again")
        values["rows"] = [Row(**row) for row in values["rows"]]
        return Measurement(**values)


def slug(name: str) -> str:
    """A folder name for a GPU: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def sources_hash(op: str, root: Path = ROOT) -> str:
    """Of every source file of an op, kernels/<op> and csrc/<op>: a table whose hash differs shows an older kernel.

    `op` may also name one file, "softcap_attention/tiled.py", where nothing else of the op was measured, or one of the
    product, "locfast/models/blocks.py".
    """
    digest = hashlib.sha256()
    places = [root / op] if op.startswith("locfast/") else [root / room / op for room in ("kernels", "csrc")]
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    for path in sorted(path for path in files if path.suffix in {".py", ".h", ".cuh", ".cpp", ".cu"}):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def commit() -> tuple[str, bool]:
    """The commit of this checkout and whether files differ from it; ("unknown", True) outside git.

    A copy of the files alone is told by LOCFAST_COMMIT what `git describe --always --abbrev=40 --dirty` says of them.
    """
    if told := os.environ.get("LOCFAST_COMMIT"):
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return head.stdout.strip(), bool(status.stdout.strip())
