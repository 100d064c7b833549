"""Compile Triton kernels for sm_90 on a machine without a GPU and print what the assembler made of them, as JSON.

Run as a program, since Triton compiles nothing in a process that interprets: it is decided at import.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_kernel(kernel, types: dict[str, str], constants: dict[str, int]) -> dict[str, object]:
    """PTX and resource usage of a kernel; pointers and integers count as multiples of 16, as PyTorch's are."""
    names = kernel.arg_names
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(kernel, signature, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {"resources": resources, "ptx": compiled.asm["ptx"]}


def main() -> None:
    from locfast.kernels.mask_embeddings import triton as mask_embeddings
    from locfast.kernels.philox import triton as philox

    blocks = {"BLOCK_T": mask_embeddings.BLOCK_TOKENS, "BLOCK_C": mask_embeddings.MAX_BLOCK_CHANNELS}
    sizes = dict.fromkeys("BVNPC", "i32")
    result = {}
    for dtype in ("fp32", "bf16", "fp16"):
        forward = {"x_ptr": f"*{dtype}", "visible_ptr": "*u8", "position_ptr": "*fp32", "out_ptr": f"*{dtype}"}
        backward = {"grad_ptr": f"*{dtype}", "visible_ptr": "*u8", "x_grad_ptr": f"*{dtype}", "partial_ptr": "*fp32"}
        result[f"mask_embeddings {dtype}"] = compile_kernel(
            mask_embeddings._mask_embeddings_kernel, forward | sizes, blocks
        )
        result[f"mask_embeddings_backward {dtype}"] = compile_kernel(
            mask_embeddings._mask_embeddings_backward_kernel, backward | sizes, blocks
        )
    types = {"counter_ptr": "*i64", "out_ptr": "*i64", "key0": "i64", "key1": "i64", "M": "i32"}
    result["philox"] = compile_kernel(philox._philox_kernel, types, {"BLOCK": 256})
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
