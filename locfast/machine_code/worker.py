"""A process that compiles Triton kernels: `python -m locfast.machine_code.worker MODULE...`.

A request is a line of JSON on stdin, its answer a line of JSON on what was stdout; all else that libraries print goes
to stderr. Runs apart from the caller because Triton decides at import whether kernels are compiled or interpreted, and
because LLVM aborts the whole process on code that it cannot select instructions for.

    {"list": [MODULE, ...] or null}                         -> {"triton": version, "kernels": [...], "notes": [...]}
    {"compile": {"module": .., "number": .., "arch": 90}}   -> {"registers": ..., ...} or {"failed": first line}

`number` counts the variants of a module.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from locfast.machine_code.sass import machine_code

CALLER_KNOWS = ("name", "dtype", "head_dim", "needs_tensor_cores", "architectures")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _list(request["list"]) if "list" in request else _compile(**request["compile"])
        except Exception as error:
            answer = {"failed": first_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def first_line(error: Exception) -> str:
    """What went wrong, in a line."""
    lines = [line.strip() for line in str(error).splitlines()]
    # Triton tells a mistake in a kernel as "at 12:8:", the source so far, a caret under it, and then the reason;
    # and one of the assembler under a heading, with what the assembler said below
    headings = [i for i, line in enumerate(lines) if line in ("^", "`ptxas` stderr:")]
    lines = [line for line in lines[headings[-1] + 1 if headings else 0 :] if line]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _list(modules: list[str] | None) -> dict[str, Any]:
    import triton

    if modules is None:
        from locfast.kernels._backend import OPS

        modules = [f"locfast.kernels.{op}.triton" for op in (*OPS, "philox")]
    kernels: list[dict[str, Any]] = []
    notes = []
    for module in modules:
        try:
            listed = _variants(module)
        except Exception as error:
            kernels.append({"name": module, "module": module, "number": 0, "failed": first_line(error)})
            continue
        if listed is None:
            notes.append(f"{module} lists no kernels: it has no variants()")
        for number, variant in enumerate(listed or ()):
            facts = {key: getattr(variant, key) for key in CALLER_KNOWS}
            kernels.append({"module": module, "number": number, **facts})
    return {"triton": triton.__version__, "kernels": kernels, "notes": notes}


@functools.cache
def _variants(module: str) -> list[Any] | None:
    """What a module lists; none where an op has no Triton kernels, None where the module has no variants()."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return []
        raise
    return loaded.variants() if hasattr(loaded, "variants") else None


def _compile(module: str, number: int, arch: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import JITFunction

    listed = _variants(module)
    assert listed is not None
    variant = listed[number]
    kernel = variant.kernel
    while not isinstance(kernel, JITFunction):  # autotuned or with heuristics
        kernel = kernel.fn
    arguments = [name for name in kernel.arg_names if name not in variant.constants]
    if wrong := set(arguments) ^ set(variant.types) | set(variant.constants) - set(kernel.arg_names):
        raise ValueError(f"the types and constants of the variant do not match the kernel's arguments: {sorted(wrong)}")
    signature = {name: variant.types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in variant.types and name not in variant.unaligned and _can_be_aligned(variant.types[name])
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, variant.constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (code,) = machine_code(cubin, arch)
    # warp specialisation starts more warps than asked for
    threads = re.search(r"^\.(?:reqntid|maxntid) (\d+)", compiled.asm["ptx"], re.MULTILINE)
    return {
        **dataclasses.asdict(code),
        "shared_bytes": compiled.metadata.shared,
        "threads": int(threads[1]) if threads else 32 * variant.num_warps,
        "tensor_columns": compiled.metadata.tmem_size if arch >= 100 else 0,
        "products": _products(compiled.asm["ttgir"]),
        "products_on_fma": len(re.findall(r"= tt\.dot .*parent = #blocked", compiled.asm["ttgir"])),
    }


def _can_be_aligned(kind: str) -> bool:
    return kind.startswith("*") or re.fullmatch(r"[iu](8|16|32|64)", kind) is not None


def _products(ttgir: str) -> int:
    return len(re.findall(r"(?:= tt\.dot |= ttng\.warp_group_dot |ttng\.tc_gen5_mma )", ttgir))


if __name__ == "__main__":
    main()
