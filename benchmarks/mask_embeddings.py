"""How near does mask_embeddings come to the speed of a copy, and to what torch.compile makes of the reference?"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from _harness import Bench, num_bytes, parser
from _variants import add_option, contenders
from torch import Tensor

from locfast.kernels.mask_embeddings import mask_embeddings, reference
from locfast.kernels.mask_embeddings.tiles import CUDA, TRITON
from tests.kernels.tolerance import assert_close_as_dtype_allows

VIEWS = 3
CASES = {  # patches, prefix tokens, width of the decoder, images
    "B/16@224": (196, 1, 768, 128),
    "L/14@336": (576, 1, 1024, 64),
    "SO400M/14@384": (729, 0, 1152, 48),
}
TILES = {"triton": TRITON, "cuda": CUDA}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", metavar="CASE", help="those whose name contains one of these")
    add_option(options, TILES)
    args = options.parse_args()
    bench = Bench("mask_embeddings", ["mask_embeddings"], args)
    cases = {"smoke": (8, 1, 64, 2)} if bench.smoke else CASES
    for name, (patches, prefix, width, batch) in cases.items():
        if args.cases is None or any(wanted in name for wanted in args.cases):
            run_case(bench, args, f"{name}, B {batch}, V {VIEWS}, bf16", batch, patches, prefix, width)
    bench.finish()


def run_case(bench: Bench, args: Any, case: str, batch: int, patches: int, prefix: int, width: int) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, device=bench.device)
    x = make(batch, patches, width, dtype=torch.bfloat16).requires_grad_()
    position = make(prefix + patches, width).requires_grad_()
    visible = torch.rand(batch, VIEWS, patches, generator=generator, device=bench.device) < 0.5
    grad = make(batch, VIEWS, prefix + patches, width, dtype=torch.bfloat16)
    inputs = (x, visible, position)
    rows: list[tuple[str, Any, tuple[str, ...], Any]] = [
        (name, functools.partial(mask_embeddings, backend=backend), directions, setting)
        for name, backend, directions, setting in contenders(args.tiles, ["triton", "cuda"])
    ]
    both = ("forward", "backward")
    rows.append(("eager", reference.mask_embeddings, both, contextlib.nullcontext))
    if not bench.smoke:
        compiled = torch.compile(reference.mask_embeddings, dynamic=False)
        rows.append(("torch.compile", compiled, both, contextlib.nullcontext))
    wide = (x.detach().double().requires_grad_(), visible, position.detach().double().requires_grad_())
    truth = with_gradients(reference.mask_embeddings, wide, grad.double())
    same = with_gradients(reference.mask_embeddings, inputs, grad)
    moved = num_bytes(x, visible, position, grad)  # x, masks and positions once; the output is as large as grad
    for who, function, directions, setting in (row for row in rows if any(name in row[0] for name in args.who)):
        for direction in directions:
            with setting():
                measure(bench, case, direction, who, function, inputs, grad, same, truth, moved)


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
    moved: int,
) -> None:
    def check() -> None:
        for name, found, near, exact in zip(
            ("output", "x.grad", "position.grad"), with_gradients(function, inputs, grad), same, truth, strict=True
        ):
            assert_close_as_dtype_allows(found, near, exact, name)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    graph = functools.cache(functools.partial(function, *inputs))

    def backward() -> object:
        return torch.autograd.grad(graph(), (inputs[0], inputs[2]), grad, retain_graph=True)

    both = functools.partial(with_gradients, function, inputs, grad)
    run, memory = (forward, forward) if direction == "forward" else (backward, both)
    bench.measure(case, direction, who, run, check, amount=moved, unit="GB/s", memory=memory)


def with_gradients(function, inputs, grad: Tensor) -> tuple[Tensor, ...]:
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out, (inputs[0], inputs[2]), grad))


if __name__ == "__main__":
    main()
