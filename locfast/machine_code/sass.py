"""Resources and instruction counts of compiled kernels, as NVIDIA's cuobjdump tells them."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from locfast.errors import UserError
from locfast.machine_code.occupancy import SHARED_RESERVED

TENSOR_CORE = re.compile(r"([BDHIOQ]MMA|[BHIQ]GMMA|UTC[HIOQ]MMA)")
"""mma.sync, wgmma (sm_90), tcgen05.mma (sm_100). HFMA2.MMA is none of them: a move on the FMA pipe."""
SHARED_MEMORY = re.compile(r"LDS|STS|LDSM|STSM|LDGSTS|ATOMS|UBLKCP|UTMALDG|UTMASTG|UTMAREDG")

FUNCTION = re.compile(r"^\s*Function\s?:?\s(\S+?):?\s*$")
RESOURCES = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)")


@dataclass
class MachineCode:
    """One kernel for one architecture."""

    function: str
    """Mangled."""
    arch: int
    registers: int = 0
    spill_bytes: int = 0
    """Local memory of a thread: its stack frame. Kernels that index no local arrays have one only to spill."""
    static_shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    """By mnemonic, as they stand in the code, each once however often it runs. MUFU by its function ("MUFU.TANH");
    16-byte accesses of global memory apart from the narrower ones ("LDG.128" beside "LDG"); no NOPs."""

    @property
    def uses_shared_memory(self) -> bool:
        return any(SHARED_MEMORY.fullmatch(name.partition(".")[0]) for name in self.instructions)


def architectures_in(library: Path) -> dict[int, str]:
    """What a shared library holds machine code for: {80: "sm_80", 90: "sm_90a"}."""
    return {
        int(name[1]): name[0] for name in re.finditer(r"sm_(\d+)[a-z]?(?=\.cubin)", _cuobjdump(library, "--list-elf"))
    }


def machine_code(file: Path, arch: int, *options: str) -> list[MachineCode]:
    """Every kernel in a cubin, or in a library of which `options` choose an architecture ("-arch", "sm_90a")."""
    kernels: dict[str, MachineCode] = {}
    current: MachineCode | None = None
    for line in _cuobjdump(file, "-sass", "-res-usage", *options).splitlines():
        if instruction := INSTRUCTION.match(line):
            if current is not None:
                name = _mnemonic(*instruction.groups())
                current.instructions[name] = current.instructions.get(name, 0) + 1
        elif function := FUNCTION.match(line):
            current = kernels.setdefault(function[1], MachineCode(function[1], arch))
        elif current is not None and (resources := {key: int(value) for key, value in RESOURCES.findall(line)}):
            current.registers = resources["REG"]
            current.spill_bytes = resources["STACK"] + resources["LOCAL"]
            current.static_shared = _without_reserved(resources["SHARED"], current.arch)
    for kernel in kernels.values():
        kernel.instructions.pop("NOP", None)
    return list(kernels.values())


def tensor_core(instructions: Mapping[str, int]) -> dict[str, int]:
    """Those of the counts that are of tensor-core instructions, e.g. {"HGMMA": 24}."""
    return {name: instructions[name] for name in sorted(instructions) if TENSOR_CORE.fullmatch(name)}


def launch_bounds(library: Path, arch: str) -> dict[str, int]:
    """Mangled name -> the most threads of a block, for the kernels of a library that declare them."""
    bounds = {}
    function, wanted = "", False
    for line in _cuobjdump(library, "-elf", "-arch", arch).splitlines():
        if line.startswith(".nv.info."):
            function = line.removeprefix(".nv.info.").strip()
        elif "Attribute:" in line:
            wanted = line.split()[-1] in ("EIATTR_MAX_THREADS", "EIATTR_REQNTID")
        elif wanted and "Value:" in line:
            x, y, z = (int(word, 16) for word in line.split()[1:4])
            bounds[function] = x * y * z
            wanted = False
    return bounds


@functools.cache
def tool(name: str) -> Path:
    """A tool of NVIDIA's, from Triton's package or else from the PATH. Raises UserError where there is none."""
    path = triton_folder() / "backends" / "nvidia" / "bin" / name
    found = path if path.is_file() else shutil.which(name)
    if found is None:
        raise UserError(
            f"Machine code is read with NVIDIA's {name}; it is neither in Triton's package ({path}) nor on the PATH. "
            "Install the triton that torch for CUDA brings, or the CUDA toolkit."
        )
    return Path(found)


def triton_folder() -> Path:
    """Where Triton is installed, found without importing it. Raises UserError where it is not."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise UserError(
            "Listing kernels means compiling them with Triton, and Triton is not installed here. It comes with torch "
            "for CUDA on Linux (no GPU is needed): pip install torch. The shapes of a backbone need none of it: "
            "python -m locfast.inspect MODEL."
        )
    return Path(spec.origin).parent


def _cuobjdump(file: Path, *options: str) -> str:
    done = subprocess.run([tool("cuobjdump"), *options, str(file)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump cannot read {file.name}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _mnemonic(name: str, modifiers: str) -> str:
    if name == "MUFU":
        return name + "." + modifiers.split(".")[1]
    if name in ("LDG", "STG") and ".128" in modifiers:
        return f"{name}.128"
    return name


def _without_reserved(shared: int, arch: int) -> int:
    # from sm_90 on the system's kilobyte is counted where a library has any kernel with shared memory, else not at all
    return shared - SHARED_RESERVED if arch >= 90 and shared >= SHARED_RESERVED else shared
