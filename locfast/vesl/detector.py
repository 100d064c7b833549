"""OWLv2, or another zero-shot detector of that kind, asked for each image's own phrases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from locfast.engine.precision import autocast
from locfast.errors import UserError
from locfast.vesl.hub import load

MODEL = "AutoModelForZeroShotObjectDetection"
KINDS = ("owlv2", "owlvit")


def check(name: str, side: int) -> None:
    """Raises UserError for what a model's configuration alone shows to be no use; its weights are not read."""
    config = load("AutoConfig", name, "--detector")
    if config.model_type not in KINDS:
        raise UserError(
            f"--detector {name}: found a model of type {config.model_type}; VESL asks detectors of the types "
            f"{' and '.join(KINDS)}, such as google/owlv2-large-patch14-ensemble"
        )
    patch = config.vision_config.patch_size
    if side % patch:
        near = [side - side % patch, side - side % patch + patch]
        raise UserError(
            f"--detector-size {side}: {name} has patches of {patch} pixels. Type --detector-size "
            f"{near[0] or near[1]} or {near[1]}."
        )


class Detector:
    """A model of the OWL family. Images come in frames of `side` pixels; position embeddings are interpolated to that.

    `pads` says whether the frame holds the image padded to a square on the right and below (OWLv2) or squashed
    (OWL-ViT), as the model's own processor has it; the padding's value and the normalisation are the processor's too.
    Raises UserError where there is no such model.
    """

    def __init__(self, name: str, side: int, device: torch.device, precision: str) -> None:
        check(name, side)
        model = load(MODEL, name, "--detector")
        processor = load("AutoProcessor", name, "--detector")
        self.model: Any = model.to(device).eval()
        self.base: Any = getattr(model, model.base_model_prefix)
        self.tokenizer, self.tokens = processor.tokenizer, model.config.text_config.max_position_embeddings
        self.side, self.device, self.precision = side, device, precision
        image = processor.image_processor
        self.pads = bool(getattr(image, "do_pad", False))
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (image.image_mean, image.image_std)
        )
        self.padding = _padding(image).to(device) if self.pads else None
        self._known: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Drop the embeddings of phrases.

        They are kept from batch to batch, since phrases come again; a product's last bits may depend on the size of
        its batch, so they are dropped at every chunk, and what a chunk gets does not depend on what was done before.
        """
        self._known = {}

    @torch.inference_mode()
    def detect(
        self, frames: Tensor, inside: Sequence[tuple[int, int]], phrases: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """frames uint8 [B, side, side, 3], the shown part's (height, width) and the phrases of each, at least one.

        Gives for each patch's box, on the device and in fp32: the score in [0, 1] of the likeliest phrase [B, N], that
        phrase's number [B, N] (the first one of several as likely), and the box [B, N, 4] as centre x, centre y,
        width and height in shares of the frame.
        """
        queries, asked = self._queries(phrases)
        with autocast(self.device, self.precision):
            features, _ = self.model.image_embedder(self._pixels(frames, inside), interpolate_pos_encoding=True)
        # The heads are small, and a box in bf16 would be off by up to 1/512 of the frame, about a pixel of 448.
        grid = features.float()
        patches = grid.flatten(1, 2)
        logits, _ = self.model.class_predictor(patches, queries, asked)
        boxes = self.model.box_predictor(patches, grid, True)
        best = logits.max(-1)
        return best.values.sigmoid(), best.indices, boxes

    def _pixels(self, frames: Tensor, inside: Sequence[tuple[int, int]]) -> Tensor:
        images = (frames.to(self.device).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        if self.padding is None:
            return images
        height, width = torch.tensor(inside, device=self.device).view(-1, 2, 1, 1, 1).unbind(1)
        place = torch.arange(self.side, device=self.device)
        return torch.where((place[:, None] < height) & (place < width), images, self.padding)

    def _queries(self, phrases: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, Q, E] of every image's phrases, and which of them are some [B, Q] bool."""
        new = list(dict.fromkeys(one for each in phrases for one in each if one not in self._known))
        if new:
            self._known.update(zip(new, self._embed(new), strict=True))
        most = max(map(len, phrases))
        rows = [torch.stack([self._known[one] for one in each]) for each in phrases]
        queries = torch.stack([F.pad(row, (0, 0, 0, most - len(row))) for row in rows])
        counts = torch.tensor([len(each) for each in phrases], device=self.device)
        return queries, torch.arange(most, device=self.device) < counts[:, None]

    def _embed(self, phrases: list[str]) -> Tensor:
        """[P, E] fp32, of length 1. Phrases longer than the text tower are cut, as transformers' pipeline does."""
        tokens = self.tokenizer(
            phrases, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self.device)
        with autocast(self.device, self.precision):
            found = self.base.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        # a tensor until transformers 4, an output that holds it since
        found = found if isinstance(found, Tensor) else found.pooler_output
        return F.normalize(found.float(), dim=-1)


def _padding(processor: Any) -> Tensor:
    """The value [1, 3, 1, 1] that a processor gives to padded pixels, normalised: versions of it differ."""
    wide = np.full((2, 4, 3), 255, np.uint8)
    pixels = processor(wide, size={"height": 4, "width": 4}, return_tensors="pt")["pixel_values"]
    return pixels[0, :, -1, -1].reshape(1, 3, 1, 1)
