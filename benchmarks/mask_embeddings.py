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
    run("mask_embeddings", ["mask_embeddings"], __doc__, mask_embeddings, reference.mask_embeddings, torch.float32)


def run(name: str, sources: list[str], description: str | None, op: Any, plain: Any, places: torch.dtype) -> None:
    """A table of `op`, of (rows [B, N, C], visible [B, V, N], places [P + N, C] in that dtype), and its reference."""
    options = parser(description)
    options.add_argument("--cases", nargs="+", metavar="CASE", help="those whose name contains one of these")
    add_option(options, TILES)
    args = options.parse_args()
    bench = Bench(name, sources, args)
    cases = {"smoke": (8, 1, 64, 2)} if bench.smoke else CASES
    for case, (patches, prefix, width, batch) in cases.items():
        if args.cases is None or any(wanted in case for wanted in args.cases):
            generator = torch.Generator(bench.device).manual_seed(0)
            make = functools.partial(torch.randn, generator=generator, device=bench.device)
            rows = make(batch, patches, width, dtype=torch.bfloat16).requires_grad_()
            place = make(prefix + patches, width).to(places).requires_grad_()
            visible = torch.rand(batch, VIEWS, patches, generator=generator, device=bench.device) < 0.5
            grad = make(batch, VIEWS, prefix + patches, width, dtype=torch.bfloat16)
            run_case(bench, args, f"{case}, B {batch}, V {VIEWS}, bf16", op, plain, (rows, visible, place), grad)
    bench.finish()


def run_case(
    bench: Bench, args: Any, case: str, op: Any, plain: Any, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> None:
    forms: list[tuple[str, Any, tuple[str, ...], Any]] = [
        (name, functools.partial(op, backend=backend), directions, setting)
        for name, backend, directions, setting in contenders(args.tiles, ["triton", "cuda"])
    ]
    both = ("forward", "backward")
    forms.append(("eager", plain, both, contextlib.nullcontext))
    if not bench.smoke:
        forms.append(("torch.compile", torch.compile(plain, dynamic=False), both, contextlib.nullcontext))
    rows, visible, place = inputs
    wide = (rows.detach().double().requires_grad_(), visible, place.detach().double().requires_grad_())
    truth = with_gradients(plain, wide, grad.double())
    same = with_gradients(plain, inputs, grad)
    moved = num_bytes(rows, visible, place, grad)  # inputs once; the output is as large as grad
    for who, function, directions, setting in (form for form in forms if any(name in form[0] for name in args.who)):
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
        names = ("output", "gradient of rows", "gradient of places")
        for name, found, near, exact in zip(names, with_gradients(function, inputs, grad), same, truth, strict=True):
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
