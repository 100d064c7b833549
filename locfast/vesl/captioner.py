"""Captions by any image-to-text model of Hugging Face transformers: BLIP, BLIP-2, GIT, Florence-2, ..."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from locfast.engine.precision import DTYPES
from locfast.vesl.hub import load


class Captioner:
    """A model and its processor. Greedy, so that the same batch gets the same captions again.

    prompt: what the model is told beside the image (a task token of Florence-2, "a photo of" for BLIP, a whole chat
    template for a chat model). It is taken off the caption's front where the model repeats it, but for `keep_prompt`.
    Raises UserError where there is no such model.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        precision: str,
        *,
        prompt: str = "",
        keep_prompt: bool = False,
        max_new_tokens: int = 77,
        num_beams: int = 1,
    ) -> None:
        self.processor = load("AutoProcessor", name, "--captioner")
        model = load("AutoModelForImageTextToText", name, "--captioner", dtype=DTYPES[precision])
        self.model = model.to(device).eval()
        # some tokenizers give what their model does not take, and `generate` refuses that
        self.taken = {*inspect.signature(model.forward).parameters}
        self.device, self.dtype, self.prompt, self.keep_prompt = device, DTYPES[precision], prompt, keep_prompt
        self.options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}

    def prepare(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """uint8 RGB [h, w, 3] of any sizes -> what the model takes, on the CPU; for worker processes."""
        asked: dict[str, Any] = {"images": [torch.from_numpy(image).permute(2, 0, 1) for image in images]}
        if self.prompt:
            asked["text"] = [self.prompt] * len(images)
        made = dict(self.processor(**asked, return_tensors="pt"))
        if self.model.config.model_type == "git" and self.prompt:
            # GIT goes on behind its prompt, and its tokenizer has ended that; BLIP takes the end off by itself
            made = {name: tensor if name == "pixel_values" else tensor[:, :-1] for name, tensor in made.items()}
        return {name: tensor for name, tensor in made.items() if name in self.taken}

    @torch.inference_mode()
    def captions(self, inputs: dict[str, Tensor]) -> list[str]:
        """One caption an image, of one line each; "" where the model said nothing."""
        there = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }
        tokens = self.model.generate(**there, **self.options)
        said = self._texts(tokens)
        if self.keep_prompt or "input_ids" not in there:
            return said
        # an encoder-decoder starts afresh, others go on behind the prompt
        return [
            text.removeprefix(front).strip() for text, front in zip(said, self._texts(there["input_ids"]), strict=True)
        ]

    def _texts(self, tokens: Tensor) -> list[str]:
        return [" ".join(text.split()) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
