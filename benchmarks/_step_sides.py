"""The two sides of benchmarks/step.py, cut into the same parts: locfast's step and the public code's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _step_flops import Way
from baselines.maskembed import PublicStep
from torch import Tensor, nn

from locfast.engine.optim import build_optimizer
from locfast.kernels.reconstruction_loss import reconstruction_loss
from locfast.methods.maskembed import MaskEmbed


@dataclass
class Side:
    """One way to take the step. `target` to `loss` make up its forward pass; `optimizer` is the one it brings along."""

    name: str
    module: nn.Module
    target: Callable[[Tensor, Tensor], Tensor]
    """(images [B, 3, H, W], visible [B, V, N]) -> what the teacher makes of every view."""
    encode: Callable[[Tensor], Tensor]
    """images -> embeddings [B, T, C]."""
    decode: Callable[[Tensor, Tensor], Tensor]
    """(embeddings, visible) -> what is rebuilt of the targets."""
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(rebuilt, target, visible) -> scalar."""
    compile: Callable[[], object]
    """Compiles the blocks from here on."""
    optimizer: torch.optim.Optimizer
    clip: float
    way: Way
    """How its FLOPs are counted."""

    def forget(self) -> None:
        """Leave nothing of a step that did not fit: gradients, and the teacher's smaller chunks."""
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.module, MaskEmbed):
            self.module.teacher_pass.chunk = self.module.config.teacher_chunk

    def update(self) -> None:
        """Clip, step and zero, as this side does it."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def locfast_side(method: MaskEmbed) -> Side:
    """What `python -m locfast.train` runs."""
    prefix = method.encoder.num_prefix_tokens
    return Side(
        "locfast fp8 teacher" if method.config.teacher_precision == "fp8" else "locfast",
        method,
        method.target,
        lambda images: method.head(method.encoder(images, uncapped=method.config.uncapped_attention)),
        lambda embeddings, visible: method.decoder(embeddings[:, prefix:], visible),
        lambda rebuilt, target, visible: reconstruction_loss(rebuilt, target, method.target_scale)[0],
        method.enable_compile,
        build_optimizer(method, method.optim, 1e-4),
        method.optim.clip or float("inf"),
        "locfast",
    )


def public_side(method: MaskEmbed) -> Side:
    """What the public code runs, on a copy of `method`'s weights.

    Its blocks are compiled one by one, as locfast's are: the whole model at once takes minutes to compile. Masks are
    locfast's, drawn on the device, where the public code draws them in numpy and waits for their copy.
    """
    step = PublicStep(method)

    def compile_blocks() -> None:
        for block in (*step.teacher.model.blocks, *step.encoder.model.blocks, *step.decoder.blocks):
            block.compile(dynamic=False)

    trained = [p for p in step.parameters() if p.requires_grad]
    return Side(
        "public code",
        step,
        step.target,
        step.encode,
        step.decode,
        lambda rebuilt, target, visible: step.loss(rebuilt, target),
        compile_blocks,
        torch.optim.AdamW(trained, lr=1e-4, betas=method.optim.betas, weight_decay=method.optim.weight_decay),
        method.optim.clip or float("inf"),
        "baseline",
    )
