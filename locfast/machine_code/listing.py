"""Every kernel of locfast for every architecture asked for, as rows."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from locfast.errors import UserError
from locfast.machine_code.library import library_kernels
from locfast.machine_code.occupancy import Occupancy, occupancy
from locfast.machine_code.pool import Pool
from locfast.machine_code.sass import architectures_in, tensor_core, triton_folder

ARCHITECTURES = (80, 90, 100)
ANSWERED = ("registers", "spill_bytes", "shared_bytes", "threads", "tensor_columns", "products", "products_on_fma")
"""Fields of a row that a worker answers under the same name."""


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture. Resources are None where they are not known, all of them where it `failed`."""

    kernel: str
    backend: str
    """"triton" or "cuda"."""
    arch: int
    failed: str | None = None
    """Why there is no machine code, in a line."""
    known: bool = True
    """False where the row stands for an architecture that this Triton cannot compile for."""
    dtype: str | None = None
    head_dim: int | None = None
    needs_tensor_cores: bool = False
    registers: int | None = None
    """Of a thread."""
    spill_bytes: int | None = None
    """Local memory of a thread."""
    shared_bytes: int | None = None
    """Of a block; None where the launch of a CUDA kernel decides."""
    threads: int | None = None
    """Of a block; None where a CUDA kernel declares no launch bounds."""
    tensor_columns: int = 0
    """Of tensor memory, of a block (sm_100)."""
    occupancy: Occupancy | None = None
    """At most, where shared_bytes is None."""
    products: int | None = None
    """Triton kernels: tl.dot in the code that was compiled (loops peeled or unrolled), ..."""
    products_on_fma: int | None = None
    """... and how many of them do without tensor cores."""
    instructions: dict[str, int] = field(default_factory=dict)
    """Counts by mnemonic, the largest first."""

    @property
    def tensor_core(self) -> dict[str, int]:
        return tensor_core(self.instructions)


@dataclass(frozen=True)
class Listing:
    rows: list[Row]
    notes: list[str]
    """What is not listed, and why."""
    triton: str
    """Its version."""


def list_kernels(
    architectures: Sequence[int] = ARCHITECTURES,
    only: str = "",
    jobs: int = 1,
    modules: Sequence[str] | None = None,
    library: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, all_of_them: None,
    choose: Callable[[dict[str, Any]], bool] = lambda kernel: True,
) -> Listing:
    """Compile the Triton kernels of `modules` (all of locfast's) and read the CUDA kernels of `library`.

    only: a part of a kernel's name, in any case. jobs: processes. choose: of the Triton kernels, by name, dtype,
    head_dim and needs_tensor_cores. Raises UserError without Triton.
    """
    unknown = [arch for arch in architectures if not _compiles_for(arch)]
    with Pool(jobs) as pool:
        listed = pool.ask({"list": modules and list(modules)})
        if "failed" in listed:
            raise UserError(f"Listing kernels needs a Triton that works; here it does not: {listed['failed']}.")
        rows = [
            Row("(all Triton kernels)", "triton", arch, f"Triton {listed['triton']} knows no sm_{arch}", known=False)
            for arch in unknown
        ]
        kernels = [kernel for kernel in listed["kernels"] if only.lower() in kernel["name"].lower() and choose(kernel)]
        tasks = [
            (kernel, arch)
            for kernel in kernels
            for arch in architectures
            if arch not in unknown and _is_for(kernel, arch)
        ]
        compiled = [task for task in tasks if "failed" not in task[0]]
        requests = [
            {"compile": {"module": kernel["module"], "number": kernel["number"], "arch": arch}}
            for kernel, arch in compiled
        ]
        done = iter(range(1, len(requests) + 1))
        answers = iter(pool.ask_all(requests, lambda: progress(next(done), len(requests))))
    rows += [_triton_row(kernel, arch, kernel if "failed" in kernel else next(answers)) for kernel, arch in tasks]
    notes = list(listed["notes"])
    if library is not None:
        rows += [row for row in _library_rows(library, architectures, notes) if only.lower() in row.kernel.lower()]
    return Listing(rows, notes, listed["triton"])


def _is_for(kernel: dict[str, Any], arch: int) -> bool:
    first, last = kernel.get("architectures", (arch, arch))
    return first <= arch <= last


def _triton_row(kernel: dict[str, Any], arch: int, answer: dict[str, Any]) -> Row:
    row = Row(
        kernel["name"],
        "triton",
        arch,
        dtype=kernel.get("dtype"),
        head_dim=kernel.get("head_dim"),
        needs_tensor_cores=kernel.get("needs_tensor_cores", False),
    )
    if "failed" in answer:
        return replace(row, failed=answer["failed"])
    return replace(
        row,
        **{name: answer[name] for name in ANSWERED},
        occupancy=occupancy(
            arch, answer["registers"], answer["shared_bytes"], answer["threads"], answer["tensor_columns"]
        ),
        instructions=_largest_first(answer["instructions"]),
    )


def _library_rows(library: Path, architectures: Sequence[int], notes: list[str]) -> list[Row]:
    there = sorted(architectures_in(library))
    if missing := [f"sm_{arch}" for arch in architectures if arch not in there]:
        held = ", ".join(f"sm_{arch}" for arch in there) or "none"
        notes.append(f"{library.name} holds machine code for {held}: no CUDA kernels for {', '.join(missing)}")
    rows = [
        Row(
            name,
            "cuda",
            code.arch,
            registers=code.registers,
            spill_bytes=code.spill_bytes,
            shared_bytes=None if code.uses_shared_memory and not code.static_shared else code.static_shared,
            threads=threads,
            occupancy=occupancy(code.arch, code.registers, code.static_shared, threads) if threads else None,
            instructions=_largest_first(code.instructions),
        )
        for name, code, threads in library_kernels(library, architectures)
    ]
    return sorted(rows, key=lambda row: (_numbers_by_size(row.kernel), row.arch))


def _numbers_by_size(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _largest_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _compiles_for(arch: int) -> bool:
    """Whether an assembler of Triton's knows sm_`arch`; true where there is none to ask, so that compiling tells."""
    folder = triton_folder() / "backends" / "nvidia" / "bin"
    assemblers = [folder / name for name in ("ptxas", "ptxas-blackwell") if (folder / name).is_file()]
    helps = [subprocess.run([path, "--help"], capture_output=True, text=True).stdout for path in assemblers]
    return not helps or any(re.search(rf"'sm_{arch}[a-z]?'", text) for text in helps)
