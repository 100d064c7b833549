"""The text tower of an open_clip model, to be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """An open_clip model without its image tower, and its tokenizer. State-dict keys are open_clip's, under `model.`.

    Scale and bias of the model's logits take no part in embeddings: they are frozen, and so is all else if `frozen`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, frozen: bool = False) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(not frozen)
        self.tokenizer = tokenizer
        self.frozen = frozen
        model.visual = nn.Identity()
        for name in ("logit_scale", "logit_bias"):
            if isinstance(getattr(model, name, None), nn.Parameter):
                getattr(model, name).requires_grad_(False)
        with torch.no_grad():
            self.joint_width: int = model.encode_text(self.tokenize([""])).shape[-1]

    @property
    def tower(self) -> Any:
        """The module that holds the blocks: open_clip's CLIP has the text tower's parts as its own."""
        return getattr(self.model, "text", self.model)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Captions -> token ids [B, L] int64, on the CPU; what is too long is cut off."""
        return self.tokenizer(texts)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, E], not normalised."""
        return self.model.encode_text(tokens)

    def enable_grad_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        if self.tower is self.model:
            self.model.transformer.grad_checkpointing = True
        else:
            self.tower.set_grad_checkpointing(True)

    def enable_compile(self) -> None:
        """torch.compile its blocks in place, where it has open_clip's."""
        for block in getattr(getattr(self.tower, "transformer", None), "resblocks", ()):
            block.compile(dynamic=False)
