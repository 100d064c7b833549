"""How near does the reconstruction loss come to the speed of a copy, and to what torch.compile makes of the reference?

The prediction is bf16 and the target fp32, as autocast leaves a decoder's last linear layer and a teacher's last norm.
The backward is that of the distances; the mean over tokens is the same few kernels for everybody, and left out.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from _harness import Bench, num_bytes, parser
from _variants import add_option, contenders
from torch import Tensor

from locfast.kernels.reconstruction_loss import LOSSES, reference, token_distance
from locfast.kernels.reconstruction_loss.tiles import TRITON
from tests.kernels.tolerance import assert_close_as_dtype_allows

CASES = {  # images, views, tokens, width
    "B/16@224": (128, 3, 197, 768),
    "L/14@336": (64, 3, 577, 1024),
    "SO400M/14@384": (48, 3, 729, 1152),
}
TILES = {"triton": TRITON}
TARGETS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", metavar="CASE", help="those whose name contains one of these")
    options.add_argument("--losses", nargs="+", choices=LOSSES, default=["mse"])
    options.add_argument("--targets", nargs="+", choices=TARGETS, default=["fp32"], help="dtype of the target")
    add_option(options, TILES)
    args = options.parse_args()
    bench = Bench("reconstruction_loss", ["reconstruction_loss"], args)
    cases = {"smoke": (2, 3, 5, 64)} if bench.smoke else CASES
    for name, shape in cases.items():
        if args.cases is None or any(wanted in name for wanted in args.cases):
            for target in args.targets:
                for loss in args.losses:
                    run_case(bench, args, f"{name}, B {shape[0]}, V {shape[1]}, bf16", shape, loss, target)
    bench.finish()


def run_case(bench: Bench, args: Any, case: str, shape: tuple[int, ...], loss: str, target_dtype: str) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, device=bench.device)
    prediction = make(shape, dtype=torch.bfloat16).requires_grad_()
    target = make(shape, dtype=TARGETS[target_dtype])
    scale = torch.tensor(0.75, device=bench.device)
    grad = make(shape[:3])
    inputs, label = (prediction, target, scale), f"{case} of {target_dtype}, {loss}"
    rows: list[tuple[str, Any, tuple[str, ...], Any]] = [
        (name, functools.partial(token_distance, loss=loss, backend=backend), directions, setting)
        for name, backend, directions, setting in contenders(args.tiles, ["triton", "cuda"])
    ]
    both, eager = ("forward", "backward"), functools.partial(reference.token_distance, loss=loss)
    rows.append(("eager", eager, both, contextlib.nullcontext))
    if not bench.smoke:
        rows.append(("torch.compile", torch.compile(eager, dynamic=False), both, contextlib.nullcontext))
    wide = (prediction.detach().double().requires_grad_(), target.double(), scale.double())
    truth = with_gradient(eager, wide, grad.double())
    del wide
    same = with_gradient(eager, inputs, grad)
    for who, function, directions, setting in (row for row in rows if any(name in row[0] for name in args.who)):
        for direction in directions:
            with setting():
                measure(bench, label, direction, who, function, inputs, grad, same, truth)


def measure(
    bench: Bench,
    case: str,
    direction: str,
    who: str,
    function: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    same: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
) -> None:
    def check() -> None:
        found = with_gradient(function, inputs, grad)
        for name, one, near, exact in zip(("distance", "prediction.grad"), found, same, truth, strict=True):
            assert_close_as_dtype_allows(one, near, exact, name)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    graph = functools.cache(functools.partial(function, *inputs))

    def backward() -> object:
        return torch.autograd.grad(graph(), inputs[0], grad, retain_graph=True)

    moved = num_bytes(*inputs, grad)  # the distances are as large as their gradient
    if direction == "backward":
        moved += num_bytes(inputs[0])  # its gradient is written
    both = functools.partial(with_gradient, function, inputs, grad)
    run, memory = (forward, forward) if direction == "forward" else (backward, both)
    bench.measure(case, direction, who, run, check, amount=moved, unit="GB/s", memory=memory)


def with_gradient(function, inputs, grad: Tensor) -> tuple[Tensor, ...]:
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs[0], grad))


if __name__ == "__main__":
    main()
