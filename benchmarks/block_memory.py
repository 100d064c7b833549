"""Peak training memory of one soft-capped ViT-L/14@336 block: the equation written out, against locfast's backends.

Forward and backward of one block at batch 8, 577 tokens: fp32 on a CPU, bf16 on a GPU. Each form runs in a process of
its own. On a CPU the figure is the peak resident size beyond what was resident once weights and inputs were there; on a
GPU what PyTorch's allocator held. No time is taken.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from _harness import SMOKE_RESULTS, command, machine, parser
from _results import RESULTS, ROOT, Measurement, Row, commit, sources_hash

MODEL, TOKENS, BATCH, SOFTCAP = "vit_large_patch14_clip_336.openai", 577, 8, 30.0
FORMS = {"public form": "reference", "locfast tiled": "tiled", "locfast triton": "triton", "locfast cuda": "cuda"}
"""What stands in the table, and the backend that computes it: the reference stores what the public code stores."""
OP = "softcap_attention"
ON_CPU = [f"{OP}/{name}.py" for name in ("layout", "reference", "tiled")]
"""The only sources that run there: a change of the fused kernels leaves a CPU's figures as they are."""
MIB = 2**20


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--batch", type=int, default=BATCH)
    known.add_argument("--measure", choices=sorted(FORMS.values()), help=argparse.SUPPRESS)
    args = known.parse_args()
    tokens, batch = (65, 2) if args.smoke else (TOKENS, args.batch)
    if args.measure:
        print(json.dumps(measure(args.measure, args.device, batch, tokens)))
        return
    import torch

    head, dirty = commit()
    device = torch.device(args.device)
    result = Measurement(
        benchmark="block_memory",
        machine=machine(device),
        sources={source: sources_hash(source) for source in (ON_CPU if device.type == "cpu" else [OP])},
        commit=head,
        dirty=dirty,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command(),
        smoke=args.smoke,
    )
    case = f"ViT-L/14@336 block, B {batch} T {tokens}, {'fp32' if device.type == 'cpu' else 'bf16'}"
    forms = {who: name for who, name in FORMS.items() if device.type == "cuda" or name in ("reference", "tiled")}
    for who, backend in forms.items():
        row = Row(case, "both", who, shape={"B": batch, "H": 16, "T": tokens, "D": 64})
        try:
            figures = in_a_new_process(backend, args)
            row.peak_mib = figures["peak"]
            row.note = f"{figures['kept']:.0f} MiB kept between forward and backward"
        except subprocess.CalledProcessError as error:
            row.note = "did not run: " + (error.stderr.strip().splitlines() or ["no message"])[-1]
        result.rows.append(row)
        print(f"{row.who:<16} {'' if row.peak_mib is None else f'{row.peak_mib:.0f} MiB at the peak, '}{row.note}")
    print(f"written to {result.write(args.out or (SMOKE_RESULTS if args.smoke else RESULTS))}")


def in_a_new_process(backend: str, args: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh interpreter, whose memory nothing else has touched."""
    options = ["--measure", backend, "--device", args.device, "--batch", str(args.batch)]
    # With a fixed threshold the C library gives every tensor of a MiB or more back as soon as it is freed.
    done = subprocess.run(
        [sys.executable, __file__, *options, *(["--smoke"] if args.smoke else [])],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(backend: str, device: str, batch: int, tokens: int) -> dict[str, float]:
    """MiB beyond weights and inputs: "kept" after the forward, and at the "peak" of forward and backward."""
    import timm
    import torch

    from locfast.kernels import _backend
    from locfast.models.blocks import run_block

    torch.manual_seed(0)
    on_gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model: Any = timm.create_model(MODEL, pretrained=False, depth=1)
    block = model.blocks[0].to(device, dtype)
    width = block.attn.qkv.in_features
    with _backend.use_backend(backend):
        warm = torch.randn(1, 16, width, device=device, dtype=dtype)  # libraries set themselves up at the first call
        run_block(block, warm, SOFTCAP).sum().backward()
        block.zero_grad(set_to_none=True)
        x = torch.randn(batch, tokens, width, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(x)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = _allocated(on_gpu)
        out = run_block(block, x, SOFTCAP)
        kept = _allocated(on_gpu) - before
        out.backward(grad)
        return {"kept": kept / MIB, "peak": (_peak(on_gpu) - before) / MIB}


def _allocated(on_gpu: bool) -> int:
    if on_gpu:
        import torch

        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak(on_gpu: bool) -> int:
    if on_gpu:
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


if __name__ == "__main__":
    main()
