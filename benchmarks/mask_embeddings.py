"""How near does mask_embeddings come to the speed of a copy, and to what torch.compile makes of the reference?"""

from __future__ import annotations

import functools

import torch
from _harness import Bench, arguments, num_bytes
from torch import Tensor

from locfast.kernels.mask_embeddings import mask_embeddings, reference
from tests.kernels.tolerance import assert_close_as_dtype_allows

VIEWS = 3
CASES = {  # patches, prefix tokens, width of the decoder, images
    "B/16@224": (196, 1, 768, 128),
    "L/14@336": (576, 1, 1024, 64),
    "SO400M/14@384": (729, 0, 1152, 48),
}


def main() -> None:
    args = arguments(__doc__)
    bench = Bench("mask_embeddings", ["mask_embeddings"], args)
    cases = {"smoke": (8, 1, 64, 2)} if bench.smoke else CASES
    for name, (patches, prefix, width, batch) in cases.items():
        run_case(bench, f"{name}, B {batch}, V {VIEWS}, bf16", batch, patches, prefix, width)
    bench.finish()


def run_case(bench: Bench, case: str, batch: int, patches: int, prefix: int, width: int) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, device=bench.device)
    x = make(batch, patches, width, dtype=torch.bfloat16).requires_grad_()
    position = make(prefix + patches, width).requires_grad_()
    visible = torch.rand(batch, VIEWS, patches, generator=generator, device=bench.device) < 0.5
    grad = make(batch, VIEWS, prefix + patches, width, dtype=torch.bfloat16)
    inputs = (x, visible, position)
    implementations = {
        "locfast triton": functools.partial(mask_embeddings, backend="triton"),
        "locfast cuda": functools.partial(mask_embeddings, backend="cuda"),
        "eager": reference.mask_embeddings,
    }
    if not bench.smoke:
        implementations["torch.compile"] = torch.compile(reference.mask_embeddings, dynamic=False)
    wide = (x.detach().double().requires_grad_(), visible, position.detach().double().requires_grad_())
    truth = with_gradients(reference.mask_embeddings, wide, grad.double())
    same = with_gradients(reference.mask_embeddings, inputs, grad)
    for who, function in implementations.items():

        def check(function=function) -> None:
            for name, found, near, exact in zip(
                ("output", "x.grad", "position.grad"), with_gradients(function, inputs, grad), same, truth, strict=True
            ):
                assert_close_as_dtype_allows(found, near, exact, name)

        def forward(function=function) -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        graph = functools.cache(functools.partial(function, *inputs))

        def backward(graph=graph) -> object:
            return torch.autograd.grad(graph(), (x, position), grad, retain_graph=True)

        moved = num_bytes(x, visible, position, grad)  # x, masks and positions once; the output is as large as grad
        bench.measure(case, "forward", who, forward, check, amount=moved, unit="GB/s")
        both = functools.partial(with_gradients, function, inputs, grad)
        bench.measure(case, "backward", who, backward, check, amount=moved, unit="GB/s", memory=both)


def with_gradients(function, inputs, grad: Tensor) -> tuple[Tensor, ...]:
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out, (inputs[0], inputs[2]), grad))


if __name__ == "__main__":
    main()
