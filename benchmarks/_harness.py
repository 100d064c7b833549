"""Measure, after checking: medians with percentiles, percent of a ceiling measured in the same run, peak memory.

A benchmark script builds a `Bench`, and calls `measure` for each implementation. Rows are printed and written as they
come, so an interrupted run keeps what it has. An implementation that fails costs its own rows and no others.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python benchmarks/x.py, without an install

import torch
from _results import RESULTS, ROOT, Measurement, Row, commit, sources_hash
from torch import Tensor

FLUSH_BYTES = 2**30
"""Beyond any L2 cache."""
SMOKE_RESULTS = ROOT / "build" / "benchmarks"
"""Where a smoke test writes unless told otherwise: git ignores it, and no page shows it."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """--out, --device, --budget and --smoke, which every benchmark understands; a script may add its own."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="folder for <gpu>/<benchmark>.json (default benchmarks/results)")
    options.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing new starts")
    options.add_argument("--smoke", action="store_true", help="small shapes and no claim; timings on a CPU always are")
    return options


def use(name: str) -> torch.device:
    """The device, made the current one: events, graphs and ceilings are of that. A plain "cuda" is it already."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _device(name: str) -> str:
    """cpu, cuda or cuda:N that is here. Raises argparse's error for others."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name!r} is no device; use cpu, cuda or cuda:N") from None
    found = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= found):
        raise argparse.ArgumentTypeError(f"{name!r} is not here: there are {found} CUDA devices; use cpu")
    return name


def arguments(description: str | None) -> argparse.Namespace:
    """The common options, parsed."""
    return parser(description).parse_args()


class Bench:
    """One benchmark on one device. A smoke test (any run on a CPU) has small shapes, three repeats and no claim."""

    def __init__(self, name: str, ops: Sequence[str], args: argparse.Namespace):
        self.device = use(args.device)
        self.smoke = args.smoke or self.device.type == "cpu"
        self.out = args.out or (SMOKE_RESULTS if self.smoke else RESULTS)
        self.deadline = time.monotonic() + args.budget
        self.missed: list[str] = []
        head, dirty = commit()
        self.result = Measurement(
            benchmark=name,
            machine=machine(self.device),
            sources={op: sources_hash(op) for op in ops},
            commit=head,
            dirty=dirty,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command(),
            smoke=self.smoke,
        )
        self.result.ceilings = {} if self.smoke else ceilings(self.device)
        print(" | ".join(f"{key} {value}" for key, value in self.result.machine.items()))
        measured = " | ".join(f"{value:.0f} {unit}" for unit, value in self.result.ceilings.items())
        print(f"ceilings measured now: {measured}" if measured else "a smoke test: no ceiling, no claim")
        print(f"{'case':<44} {'direction':<9} {'who':<22} {'ms':>8} {'p20':>8} {'p80':>8} {'rate':>14} {'%':>4} MiB")

    @property
    def path(self) -> Path:
        """Where the table lies."""
        return self.result.path(self.out)

    def measure(
        self,
        case: str,
        direction: str,
        who: str,
        run: Callable[[], object],
        check: Callable[[], str | None],
        *,
        amount: float,
        unit: str,
        shape: dict[str, int] | None = None,
        memory: Callable[[], object] | None = None,
    ) -> Row | None:
        """Time `run` once `check` has passed. `amount`: bytes for GB/s, FLOPs for TFLOP/s, of one run.

        An implementation that raises, in its check or in its run, gets a row that says so and no time; what `check`
        returns stands beside the time. `memory` runs instead of `run` where the peak memory is taken (a backward's
        peak is its forward's too). None where the budget left no time.
        """
        row = Row(case, direction, who, unit=unit, shape=shape or {})
        if time.monotonic() > self.deadline:
            self.missed.append(f"{case}, {direction}, {who}")
            return None
        try:
            row.note = check() or ""
            row.peak_mib = peak_memory(memory or run, self.device)
            row.ms, row.ms_p20, row.ms_p80 = time_ms(run, self.device)
        except AssertionError as error:
            row.note = f"refused, result is wrong: {first_line(error)}"
        except torch.OutOfMemoryError:
            row.note = "did not run: out of memory"
        except Exception as error:  # a peer may fail in any way; the table tells, and the others are still measured
            row.note = f"did not run: {first_line(error)}"
        if row.ms is not None:
            row.rate = amount / row.ms / {"GB/s": 1e6, "TFLOP/s": 1e9}[unit]
            row.percent = 100 * row.rate / self.result.ceilings[unit] if unit in self.result.ceilings else None
        else:
            self._clear_up()
        self.add(row)
        return row

    def absent(self, who: str, why: str) -> None:
        """A row for an implementation that no case can run: not installed, does not load."""
        self.add(Row("all", "", who, note=why))

    def finish(self) -> None:
        """Say where the table lies and what the budget left out."""
        if self.result.rows:
            print(f"written to {self.result.write(self.out)}")
        for missed in self.missed:
            print(f"not reached: {missed}")

    def add(self, row: Row) -> None:
        """Print a row and write the table."""
        self.result.rows.append(row)
        self.result.write(self.out)
        print(_line(row), flush=True)

    def _clear_up(self) -> None:
        """After a failure: give its memory back. A kernel's fault ends the CUDA context, and with it the run."""
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except Exception as error:
            print(f"the CUDA context is lost, nothing more can run: {first_line(error)}")
            self.deadline = -float("inf")


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on: device, driver, versions."""
    found = {"gpu": "cpu", "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cpu":
        found["cpu"] = f"{_processor()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        try:
            smi = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError):
            smi = ["unknown"]
        import triton

        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["triton"] = triton.__version__
        found["driver, max clock, power limit"] = next(iter(smi[device.index or 0 :]), "unknown")
    return found


def time_ms(run: Callable[[], object], device: torch.device) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in ms. On a GPU with a cold L2 cache before each repeat."""
    if device.type == "cuda":
        times = gpu_times(run, device)
        low, _, _, high = statistics.quantiles(times, n=5, method="inclusive")
        return statistics.median(times), low, high
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), min(times), max(times)


def gpu_times(run: Callable[[], object], device: torch.device, total_ms: float = 100.0) -> list[float]:
    """Of single runs in ms, about `total_ms` of them: what the GPU took, without what Python took to launch it.

    Writing 1 GiB and reading it again empties the L2 cache, and takes long enough (0.5 ms on an H200) for the host to
    launch a whole forward or backward meanwhile. An H200 runs small shapes in less time than any eager call needs on
    the host. What was only written would stay in the cache, up to 50 MB that the timed kernel would have to write back.
    """
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device=device)

    def repeats(count: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize(device)
        for start, end in marks:
            flush.zero_()
            flush.sum()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in marks]

    run()
    one = max(statistics.median(repeats(5)), 1e-3)
    repeats(min(100, int(25 / one)))  # clocks and caches settle
    return repeats(min(500, max(10, int(total_ms / one))))


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """MiB allocated at the peak of one run beyond what was there before; None on a CPU."""
    if device.type != "cuda":
        return None
    run()
    gc.collect()  # or a graph that an earlier run left behind counts as there before, and is freed meanwhile
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def ceilings(device: torch.device) -> dict[str, float]:
    """A GPU's rates now: GB/s of a large copy (read and written), TFLOP/s of a large bf16 matmul. None for a CPU."""
    if device.type != "cuda":
        return {}
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    copy, _, _ = time_ms(lambda: target.copy_(source), device)
    size = 8192
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    matmul, _, _ = time_ms(lambda: a @ b, device)
    return {"GB/s": 2 * source.nbytes / copy / 1e6, "TFLOP/s": 2 * size**3 / matmul / 1e9}


def command() -> str:
    """What to type to measure the same again, wherever the result lies: "python benchmarks/x.py --only locfast"."""
    typed, words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"], iter(sys.argv[1:])
    for word in words:
        if word in ("--out", "--budget"):
            next(words, None)
        elif not word.startswith(("--out=", "--budget=")):
            typed.append(word)
    return shlex.join(typed)


def first_line(error: Exception) -> str:
    """An error in one line, with its type unless that says nothing."""
    text = (str(error).splitlines() or [""])[0][:240]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


def num_bytes(*tensors: Tensor) -> int:
    """Bytes of all tensors together."""
    return sum(t.nbytes for t in tensors)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _line(row: Row) -> str:
    head = f"{row.case:<44} {row.direction:<9} {row.who:<22} "
    if row.ms is None:
        return head + row.note
    peak = "" if row.peak_mib is None else f" {row.peak_mib:.0f}"
    rate = "" if row.rate is None else f"{row.rate:.1f} {row.unit}"
    percent = "" if row.percent is None else f"{row.percent:.0f}"
    note = f"  {row.note}" if row.note else ""
    return head + f"{row.ms:8.3f} {row.ms_p20:8.3f} {row.ms_p80:8.3f} {rate:>14} {percent:>4}{peak}{note}"
