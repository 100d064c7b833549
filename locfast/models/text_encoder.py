"""The text tower of an open_clip model, to be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.models import compiled

STEP = 8
"""Texts are cut to a multiple of so many tokens: few lengths to compile for, and even ones for tensor cores."""


class TextEncoder(nn.Module):
    """An open_clip model without its image tower, and its tokenizer. State-dict keys are open_clip's, under `model.`.

    Scale and bias of the model's logits and CoCa's text decoder take no part in embeddings: they are frozen, and so is
    all else if `frozen`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, frozen: bool = False) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(not frozen)
        self.tokenizer = tokenizer
        self.frozen = frozen
        model.visual = nn.Identity()
        for name in ("logit_scale", "logit_bias", "text_decoder"):
            if isinstance(part := getattr(model, name, None), nn.Parameter | nn.Module):
                part.requires_grad_(False)
        self.cuts = _is_causal(self.tower) and type(self.tokenizer).__name__ == "SimpleTokenizer"
        words, known = int(tokenizer([""]).max()) + 1, getattr(self.tower, "token_embedding", None)
        if isinstance(known, nn.Embedding) and words > known.num_embeddings:
            raise UserError(
                f"the text tower knows {known.num_embeddings} tokens, and its tokenizer has {words} at least. Set "
                "vocab_size in its config."
            )
        with torch.no_grad():
            self.joint_width: int = model.encode_text(tokenizer([""])).shape[-1]

    @property
    def tower(self) -> Any:
        """The module that holds the blocks: open_clip's CLIP has the text tower's parts as its own."""
        return getattr(self.model, "text", self.model)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Captions -> token ids [B, L] int64, on the CPU; what is too long is cut off.

        A causal tower reads an embedding off the end token, which nothing behind it reaches: L is then that of the
        longest text, rounded up. Elsewhere it is the context.
        """
        tokens = self.tokenizer(texts)
        if not self.cuts:
            return tokens
        longest = int(tokens.argmax(1).max()) + 1  # the end token has the highest number, as the tower knows too
        return tokens[:, : -(-longest // STEP) * STEP]

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, E], not normalised."""
        tower, length = self.tower, tokens.shape[1]
        if not self.cuts or length == len(tower.positional_embedding):
            return self.model.encode_text(tokens)
        cast = tower.transformer.get_cast_dtype()
        x = (tower.token_embedding(tokens) + tower.positional_embedding[:length]).to(cast)
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
        pooled = x[torch.arange(len(x), device=x.device), tokens.argmax(1)]
        project = tower.text_projection
        if project is None:
            return pooled
        return project(pooled) if isinstance(project, nn.Linear) else pooled @ project

    def enable_grad_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        if self.tower is self.model:
            self.model.transformer.grad_checkpointing = True
        else:
            self.tower.set_grad_checkpointing(True)

    def enable_compile(self) -> None:
        """torch.compile its blocks in place, where it has open_clip's.

        For exact shapes at first, then for any: the number of distinct phrases differs from step to step.
        """
        for block in getattr(getattr(self.tower, "transformer", None), "resblocks", ()):
            block.compile(dynamic=None, backend=compiled.BACKEND)


def _is_causal(tower: Any) -> bool:
    """Whether a tower of open_clip's is its own transformer under a causal mask, pooled at the end token."""
    pooled = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None)) == "argmax"
    appended = getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False)
    return pooled and not appended and getattr(tower, "attn_mask", None) is not None
