"""What does an optimiser step cost: AdamW as a loop, foreach, fused, apex's where it is installed; and the clip?

Weights, gradients and state of the whole network go through once: the rate is that of the bytes moved, beside a copy's.
The networks have the parameter shapes of a ViT. A loop starts thousands of kernels: its time on a GPU is the host's.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from _harness import Bench, arguments, first_line, num_bytes
from torch import Tensor, nn

CASES = {"ViT-B/16@224": (768, 12, 16, 196), "ViT-L/14@336": (1024, 24, 14, 576)}
SMOKE = {"smoke": (64, 2, 4, 16)}
"""Width, blocks, side of a patch, patches."""
SETTINGS: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
"""MaskEmbed's. apex's LAMB takes them too."""
CLIP = 1.0
CLOSE = 1e-5
"""Of a weight after three steps, relative to the largest: forms of AdamW differ by fp32 rounding, 1e-7 an operation."""


def main() -> None:
    args = arguments(__doc__)
    bench = Bench("optimizers", [], args)
    peers, missing = apex_optimizers()
    for case, network in (SMOKE if bench.smoke else CASES).items():
        generator = torch.Generator(bench.device).manual_seed(0)
        weights = [
            0.02 * torch.randn(shape, generator=generator, device=bench.device) for shape in vit_shapes(*network)
        ]
        run_case(bench, f"{case}, {sum(w.numel() for w in weights) / 1e6:.1f} M", weights, peers)
    for name, why in missing.items():
        bench.absent(name, why)
    bench.finish()


def vit_shapes(width: int, depth: int, patch: int, patches: int) -> list[tuple[int, ...]]:
    """Of every parameter of a ViT without a head: CLS, positions, patch embedding, blocks, final norm."""
    w = width
    attention = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,)]
    mlp = [(w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    stem = [(1, 1, w), (1, 1 + patches, w), (w, 3, patch, patch), (w,)]
    return [*stem, *(depth * (attention + mlp)), (w,), (w,)]


def apex_optimizers() -> tuple[dict[str, Any], dict[str, str]]:
    """apex's optimisers that load here, and why the others do not."""
    found, missing = {}, {}
    for name in ("FusedAdam", "FusedLAMB"):
        try:
            found[name] = getattr(importlib.import_module("apex.optimizers"), name)
        except ImportError as error:
            # a project about web sessions has the name apex on the package index: only NVIDIA's has `optimizers`
            missing[f"apex {name}"] = f"not installed ({first_line(error)})"
        except Exception as error:
            missing[f"apex {name}"] = f"does not load: {first_line(error)}"
    return found, missing


def run_case(bench: Bench, case: str, weights: list[Tensor], peers: dict[str, Any]) -> None:
    forms: dict[str, Callable[..., torch.optim.Optimizer]] = {
        f"AdamW {name}": lambda params, flags=flags: torch.optim.AdamW(params, **SETTINGS, **flags)
        for name, flags in {
            "loop": {"foreach": False},
            "foreach": {"foreach": True},
            "fused": {"fused": True},
        }.items()
    }
    if "FusedAdam" in peers:
        forms["apex FusedAdam"] = lambda params: peers["FusedAdam"](params, adam_w_mode=True, **SETTINGS)
    if "FusedLAMB" in peers:
        forms["apex FusedLAMB"] = lambda params: peers["FusedLAMB"](params, max_grad_norm=0.0, **SETTINGS)
    expected = after_three_steps(forms["AdamW loop"], weights)
    # read: weight, gradient and two moments; written: weight and two moments
    moved = 7 * num_bytes(*weights)
    for who, make in forms.items():

        def check(who=who, make=make) -> str | None:
            found = after_three_steps(make, weights)
            if who == "apex FusedLAMB":  # another rule: no number to compare with
                assert all(bool(weight.isfinite().all()) for weight in found), "a weight is not finite"
                return "another update rule"
            assert_close(found, expected)
            return None

        params = with_gradients(weights)
        optimizer = make(params)
        bench.measure(case, "step", who, optimizer.step, check, amount=moved, unit="GB/s")
        del params, optimizer
    clips(bench, case, weights)


def clips(bench: Bench, case: str, weights: list[Tensor]) -> None:
    """Norm and scaling: gradients are read twice and written once."""
    expected = with_gradients(weights)
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in expected]).double())
    for who, foreach in (("clip loop", False), ("clip foreach", True)):
        params = with_gradients(weights)

        def clip(params=params, foreach=foreach) -> Tensor:
            return nn.utils.clip_grad_norm_(params, CLIP, foreach=foreach)

        def check(foreach=foreach) -> None:
            params = with_gradients(weights)
            nn.utils.clip_grad_norm_(params, CLIP, foreach=foreach)
            scale = min(1.0, CLIP / float(norm))
            assert_close([p.grad for p in params], [p.grad * scale for p in expected])

        bench.measure(case, "clip", who, clip, check, amount=3 * num_bytes(*weights), unit="GB/s")


def with_gradients(weights: list[Tensor]) -> list[nn.Parameter]:
    """Copies of the weights as parameters, their gradients drawn from a seed."""
    generator = torch.Generator(weights[0].device).manual_seed(1)
    params = [nn.Parameter(copy.deepcopy(weight)) for weight in weights]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, device=param.device) * 1e-2
    return params


def after_three_steps(make: Callable[..., torch.optim.Optimizer], weights: list[Tensor]) -> list[Tensor]:
    params = with_gradients(weights)
    optimizer = make(params)
    for _ in range(3):
        optimizer.step()
    return [param.detach() for param in params]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
        assert error < CLOSE, f"tensor {number} is off by {error:.1e}"


if __name__ == "__main__":
    main()
