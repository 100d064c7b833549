"""Do texts better travel round a ring of ranks, or are they gathered? A region-contrastive loss with its backward.

Ranks are processes of this machine: gloo between CPUs, NCCL between GPUs. On a CPU they share its cores, so that only
the difference of two rows tells something. The time is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

from _harness import machine, parser
from _results import RESULTS, ROOT, Measurement, Row, commit, sources_hash

OP = "region_contrastive_loss"
EXCHANGES = ("ring", "gather")
REPEATS = 7
CASES = [(2, 256, 512), (2, 2048, 512), (4, 128, 512), (4, 1024, 512)]
"""Ranks, regions of a rank and width, on a CPU."""
PER_RANK = (1024, 4096, 16384)
"""Regions of each of all GPUs, of width 768."""


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--rank-of", type=int, nargs=3, metavar=("RANKS", "R", "E"), help=argparse.SUPPRESS)
    args = known.parse_args()
    if args.rank_of:
        measure(args.device, *args.rank_of)
        return
    import torch

    device, head = torch.device(args.device), commit()
    ranks = torch.cuda.device_count()
    cases = CASES if device.type == "cpu" else [(ranks, regions, 768) for regions in PER_RANK]
    if device.type == "cuda" and ranks < 2:
        known.error("texts travel between GPUs, of which one is here; use --device cpu")
    result = Measurement(
        benchmark="region_exchange",
        machine=machine(device),
        sources={OP: sources_hash(OP)} if device.type == "cuda" else dict(map(_hashed, ("ops", "tiled", "exchange"))),
        commit=head[0],
        dirty=head[1],
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=f"python benchmarks/region_exchange.py --device {args.device}",
        smoke=args.smoke,
    )
    for ranks, regions, width in cases[:1] if args.smoke else cases:
        times = in_processes(args.device, ranks, regions, width)
        for exchange, found in times.items():
            row = Row(f"{ranks} ranks, R {regions} each, E {width}", "both", f"locfast {exchange}")
            row.ms, row.shape = statistics.median(found), {"ranks": ranks, "R": ranks * regions, "E": width}
            row.ms_p20, _, _, row.ms_p80 = statistics.quantiles(found, n=5, method="inclusive")
            result.rows.append(row)
            print(f"{row.case:<36} {row.who:<16} {row.ms:9.2f} ms ({row.ms_p20:.2f}, {row.ms_p80:.2f})", flush=True)
    print(f"written to {result.write(args.out or (ROOT / 'build' / 'benchmarks' if args.smoke else RESULTS))}")


def _hashed(module: str) -> tuple[str, str]:
    """Of a source that runs on a CPU."""
    return f"{OP}/{module}.py", sources_hash(f"{OP}/{module}.py")


def in_processes(device: str, ranks: int, regions: int, width: int) -> dict[str, list[float]]:
    """Milliseconds of every repeat, by exchange."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    asked = [sys.executable, __file__, "--device", device, "--rank-of", str(ranks), str(regions), str(width)]
    processes = [
        subprocess.Popen(
            asked, env=common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    told = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a rank failed; what it said stands above")
    return json.loads(told[0].splitlines()[-1])


def measure(device: str, ranks: int, regions: int, width: int) -> None:
    """One rank's part; the first one prints the times."""
    import torch
    import torch.distributed as dist

    from locfast.kernels.region_contrastive_loss import region_contrastive_loss

    rank = int(os.environ["RANK"])
    here: Any = torch.device("cuda", rank) if device.startswith("cuda") else torch.device("cpu")
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    generator = torch.Generator().manual_seed(rank)
    dtype = torch.bfloat16 if here.type == "cuda" else torch.float32
    x, y = (torch.randn(regions, width, generator=generator).to(here, dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0, device=here, requires_grad=True)
    times: dict[str, list[float]] = {exchange: [] for exchange in EXCHANGES}
    results: dict[str, list[Any]] = {}
    for repeat in range(REPEATS + 1):
        for exchange in EXCHANGES:  # in turns, so that both meet the same machine
            dist.barrier()
            start = time.perf_counter()
            loss = region_contrastive_loss(x, y, logit_scale=scale, group=dist.group.WORLD, exchange=exchange)
            results[exchange] = [loss.detach(), *torch.autograd.grad(loss, (x, y, scale))]
            if here.type == "cuda":
                torch.cuda.synchronize()
            slowest = torch.tensor(1e3 * (time.perf_counter() - start), device=here)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if repeat:  # the first one sets up connections
                times[exchange].append(slowest.item())
    for one, other in zip(*results.values(), strict=True):  # that either is right is for the tests to say
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    if rank == 0:
        print(json.dumps(times))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
