"""The CUDA kernels in locfast/_C.so, by readable names."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from locfast.machine_code.sass import MachineCode, architectures_in, launch_bounds, machine_code

DROPPED = re.compile(r"^void |\(anonymous namespace\)::|_GLOBAL__N_\w*::|\b(?:locfast|c10|cuda)::")
ENUMERATOR = re.compile(r"\((?:\w+::)*(\w+)\)(?=-?\d)")
"""As demanglers write them: "(softcap_attention::Tanh)1"."""


def library_kernels(library: Path, architectures: Sequence[int]) -> list[tuple[str, MachineCode, int | None]]:
    """(readable name, machine code, most threads of a block where declared) of every kernel in a shared library.

    Of those architectures that it holds.
    """
    kernels = []
    for arch, name in architectures_in(library).items():
        if arch in architectures:
            bounds = launch_bounds(library, name)
            of_arch = machine_code(library, arch, "-arch", name)
            readable_names = readable([code.function for code in of_arch])
            kernels += [
                (name, code, bounds.get(code.function)) for name, code in zip(readable_names, of_arch, strict=True)
            ]
    return kernels


def readable(mangled: list[str]) -> list[str]:
    """As in "mask_embeddings::forward_kernel<BFloat16, 8>", for names as the compiler mangles them."""
    demangler = shutil.which("c++filt") or shutil.which("cu++filt")
    if demangler is None:
        return [_by_hand(name) for name in mangled]
    done = subprocess.run([demangler], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [ENUMERATOR.sub(r"\1 ", _without_arguments(DROPPED.sub("", name))) for name in done.stdout.splitlines()]


def _without_arguments(name: str) -> str:
    """Cut where the list of arguments opens: the first parenthesis outside of angle brackets."""
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def _by_hand(mangled: str) -> str:
    """Names and template arguments without a demangler: enough for kernels in namespaces over types and numbers."""
    place, words = 2 if mangled.startswith("_Z") else len(mangled), []
    while place < len(mangled):
        if length := re.compile(r"\d+").match(mangled, place):
            place = length.end() + int(length[0])
            words.append(mangled[length.end() : place])
        elif number := re.compile(r"L[a-z](n?\d+)E").match(mangled, place):
            words.append(number[1].replace("n", "-"))
            place = number.end()
        elif mangled.startswith("Ev", place):  # the template is closed, and the arguments of a void function begin
            break
        else:
            words.append({"f": "float", "d": "double", "i": "int"}.get(mangled[place], ""))
            place += 1
    kept = [word for word in words if word and word not in ("locfast", "c10") and not word.startswith("_GLOBAL__N")]
    return " ".join(kept) or mangled
