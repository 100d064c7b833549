"""Launches as a GPU's runtime sees them, compiled for sm_90 and not run: `python -m tests.kernels.launches`.

The interpreter neither makes a constant of an integer that is 1 nor looks at options and types of pointers. A process
of its own, because Triton decides at import whether kernels are compiled or interpreted. Prints a JSON object for each
launch: the kernel's name and the launch's options.
"""

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from locfast.kernels.mask_embeddings import triton as mask_embeddings
from locfast.kernels.philox import triton as philox
from locfast.kernels.quantize_rows import triton as quantize_rows
from locfast.kernels.reconstruction_loss import triton as reconstruction_loss
from locfast.kernels.region_contrastive_loss import ops as region_losses
from locfast.kernels.softcap_attention import triton as attention


class Driver:
    """One H100, as far as compiling goes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver.set_active(Driver())
    JITFunction.run = _compiled_and_not_run(JITFunction.run)
    for dtype, masked in ((torch.bfloat16, True), (torch.float32, False)):
        launch_attention(dtype, masked)
    x, visible = torch.zeros(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
    mask_embeddings.mask_embeddings(x, visible, x[0])
    mask_embeddings.mask_embeddings_backward(x[None], visible, 0)
    quantize_rows.quantize_rows(x)
    tokens, scale, slopes = torch.zeros(1, 1, 1, 1), torch.ones(()), torch.zeros(2, 1, 1, 1)
    reconstruction_loss.token_distance(tokens, tokens, scale, "cosine")
    reconstruction_loss.token_distance_backward(tokens[0], tokens, tokens, scale, slopes, "cosine")
    for bias in (None, scale):
        launch_region_loss(bias)
    philox.philox(torch.zeros(1, 4, dtype=torch.int64), (1, 2**32 - 1))


def launch_attention(dtype: torch.dtype, masked: bool) -> None:
    """Of every size the least, so that all that can become a constant does."""
    q, grad = torch.zeros(2, 1, 1, 1, 8, dtype=dtype)
    key_mask = torch.ones(1, 1, dtype=torch.bool) if masked else None
    saved = attention.softcap_attention(q, q, q, 30.0, 1.0, key_mask, dtype != torch.float32)
    attention.softcap_attention_backward(grad, q, q, q, *saved, 30.0, 1.0, key_mask)


def launch_region_loss(bias: torch.Tensor | None) -> None:
    """Of either form; through the operators' own functions, which do no more than launch on a rank alone."""
    x, number, valid = torch.zeros(1, 1, dtype=torch.bfloat16), torch.ones(()), torch.ones(1, dtype=torch.bool)
    where = "", "auto", "triton"
    loss, *saved = region_losses._forward(x, x, number, bias, valid, 0.9, x.dtype, *where[:2], True, where[2])
    region_losses._backward(loss, x, x, number, bias, *saved, 0.9, [True] * 4, *where)


def _compiled_and_not_run(run: Any) -> Any:
    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        facts = {name: getattr(kernel.metadata, name) for name in ("num_warps", "num_stages", "maxnreg")}
        print(json.dumps({"kernel": self.fn.__name__, "fused": kernel.metadata.enable_fp_fusion, **facts}), flush=True)
        return kernel

    return compiled


if __name__ == "__main__":
    main()
