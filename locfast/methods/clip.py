"""Contrastive fine-tuning of an image tower with a text tower (CLIP's loss; UTA, section 3 and appendix A.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locfast.config.clip import MAX_SCALE, ClipConfig
from locfast.data.spec import ImageSpec, Record, View
from locfast.errors import UserError
from locfast.kernels import _backend
from locfast.kernels.region_contrastive_loss import region_contrastive_loss
from locfast.methods import ranks
from locfast.methods.base import Batch, Method
from locfast.methods.layer_decay import decayed_groups
from locfast.models.drop_path import set_drop_path
from locfast.models.image_tower import load_image_tower
from locfast.models.open_clip_image import open_clip_image_tower
from locfast.models.open_clip_model import load_open_clip
from locfast.models.prompter import wide
from locfast.models.text_encoder import TextEncoder
from locfast.random import Keys, uniform

IMAGE = "image"
OPEN_CLIP = "open_clip"
"""As --model: the image tower that the text tower came with."""


@dataclass(frozen=True)
class Look:
    """A micro-batch, embedded without gradients."""

    tokens: Tensor  # [B, L] int64
    images: Tensor  # [B, E]
    texts: Tensor  # [B, E]


@dataclass(frozen=True)
class Share:
    """What one micro-batch is told of the whole step's loss."""

    look: Look
    loss: Tensor  # scalar: of the whole step
    images: Tensor  # [B, E] fp32 at least: its gradient, times rounds and ranks, over which it is averaged
    texts: Tensor | None  # likewise; None for a frozen text tower
    scale: Tensor | None  # that of the logarithm of the scale, over this rank's rows, times ranks


class Clip(Method):
    """Image and caption of a pair are drawn together, and apart from all others of the global batch.

    The loss couples every row with every other, so micro-batches are embedded twice: first without gradients, for the
    loss of the whole step and its gradient with respect to every embedding, then with them, to send that gradient on.

    Raises:
        UserError: the image tower has no CLS token or another joint width than the text tower; names and weights that
            lead to no tower.
    """

    name = "clip"
    """Of the method's own flags, for errors."""
    looks_ahead = True
    draws_on_host = True

    def __init__(
        self,
        config: ClipConfig,
        *,
        model: str,
        pretrained: bool = True,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.optim = config.optim
        weights = config.text_pretrained if pretrained else "none"
        flags = (f"--{self.name}.text", f"--{self.name}.text-pretrained")
        both, tokenizer = load_open_clip(config.text, weights, seed=seed, flags=flags)
        visual = both.visual
        self.text = TextEncoder(both, tokenizer, frozen=config.freeze_text)
        if model == OPEN_CLIP:
            self.image = open_clip_image_tower(visual, config.text, image_size=image_size, flag=flags[0])
        else:
            how: dict[str, Any] = {"new_head": config.projection == "new", "seed": seed, "image_size": image_size}
            how["section"] = self.name
            self.image = load_image_tower(model, self.text.joint_width, pretrained, **how)
        set_drop_path(self.image.backbone, config.drop_path)
        self.checkpointing = False
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)), config.learn_temperature)
        self.train()

    def forward(self, batch: Batch, draw: Tensor) -> dict[str, Tensor]:
        """The mean of both directions' cross-entropies over the pairs of all ranks and micro-batches of a step.

        In evaluation every batch stands alone: its loss is that of telling apart so many pairs as it has.
        """
        share: Share | None = batch.get("ahead")
        told = {"temperature": 1 / self.scale().detach()} if self.config.learn_temperature else {}
        if share is not None:
            return {"loss": self._pass_on(batch, share), **told}
        images, texts = self.embed(batch, self.tokens(batch, draw))
        group = ranks.process_group(self.training)
        loss = self.contrast(images, texts)
        return {"loss": ranks.with_gradient(loss, loss * ranks.size(group)), **told}

    def embed(self, batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images and texts in the joint space, of one dtype: [B, E] each."""
        images = self.embed_images(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.text.frozen):
            texts = self.text(tokens)
        dtype = torch.promote_types(images.dtype, texts.dtype)
        return images.to(dtype), texts.to(dtype)

    def embed_images(self, batch: Batch) -> Tensor:
        return self.image.embed(self.image.backbone(batch["views"][IMAGE], checkpointing=self.checkpointing))

    def contrast(self, images: Tensor, texts: Tensor) -> Tensor:
        """CLIP's loss of rows [R, E] and those of all other ranks; a gradient is that of the whole loss."""
        group = ranks.process_group(self.training)
        return region_contrastive_loss(images, texts, logit_scale=self.scale(), filter_threshold=None, group=group)

    def scale(self) -> Tensor:
        """What cosines are multiplied with."""
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        return self.log_scale.exp()

    def look(self, batch: Batch, draw: Tensor) -> Look:
        tokens = self.tokens(batch, draw)
        return Look(tokens, *self.embed(batch, tokens))

    def weigh(self, looks: list[Look]) -> list[Share]:
        """The loss of a whole step, and what each micro-batch has to send back for its gradient."""
        images = torch.cat([look.images for look in looks]).requires_grad_()
        texts = torch.cat([look.texts for look in looks]).requires_grad_(not self.text.frozen)
        with torch.enable_grad():
            loss = self.contrast(images, texts)
        trained = {"images": images, "texts": texts, "scale": self.log_scale}
        trained = {name: tensor for name, tensor in trained.items() if tensor.requires_grad}
        found = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        rounds, averaged = len(looks), ranks.size(ranks.process_group(self.training))
        rows = [len(look.images) for look in looks]
        parts = {name: (wide(found[name]) * rounds * averaged).split(rows) for name in found if name != "scale"}
        scale = found["scale"] * averaged if "scale" in found else None
        told = zip(looks, parts["images"], parts.get("texts", [None] * rounds), strict=True)
        return [Share(look, loss.detach(), of_images, of_texts, scale) for look, of_images, of_texts in told]

    def _pass_on(self, batch: Batch, share: Share) -> Tensor:
        """The step's loss, with the gradient of this micro-batch's share of it."""
        sent = (wide(self.embed_images(batch)) * share.images).sum()
        if share.texts is not None:
            sent = sent + (wide(self.text(share.look.tokens)) * share.texts).sum()
        if share.scale is not None:
            sent = sent + self.log_scale * share.scale
        return ranks.with_gradient(share.loss, sent)

    def tokens(self, batch: Batch, draw: Tensor) -> Tensor:
        """Token ids of one caption a sample [B, L] int64, on the method's device."""
        records: list[Record] = batch["records"]
        choices = [[text for text in record.texts if text.strip()] for record in records]
        texts = [own[int(place * len(own))] for own, place in zip(choices, draw.tolist(), strict=True)]
        return self.upload(self.text.tokenize(texts))

    def upload(self, tensor: Tensor) -> Tensor:
        """A tensor of the host's on the method's device, without a wait for it."""
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)

    def draw(self, keys: Keys) -> Tensor:
        """Which of a sample's captions is taken, as a place in [0, 1): [B]."""
        return uniform(keys, "clip.caption", 1)[:, 0]

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        _backend.check("region_contrastive_loss", device, dtype)

    def notes(self, micro_batch: int, ranks: int, accumulation: int) -> list[str]:
        if micro_batch * ranks * accumulation == 1:
            raise UserError("--batch-size 1: a pair alone has no other to be told from, and the loss is always 0.")
        return []

    def parameter_groups(self) -> list[dict[str, Any]]:
        config, optim = self.config, self.optim
        decay = config.layer_decay or (0.75 if self.image.backbone.embed_dim <= 768 else 0.85)
        how: dict[str, Any] = {"decay": decay, "weight_decay": optim.weight_decay, "every": optim.decay_all}
        groups = decayed_groups(self.image.named_parameters(), **how)
        groups += decayed_groups(self.text.named_parameters(), scale=config.text_lr_scale, **how)
        alone = {"params": [self.log_scale], "weight_decay": 0.0, "lr_scale": 1.0}
        return [*groups, alone] if config.learn_temperature else groups

    def image_spec(self) -> ImageSpec:
        config = self.config
        return self._spec(crop=config.crop, scale=config.crop_scale, flip=config.flip)

    def validation_spec(self) -> ImageSpec:
        return self._spec(crop="center")

    def _spec(self, **policy: Any) -> ImageSpec:
        backbone = self.image.backbone
        looks: dict[str, Any] = {"mean": backbone.mean, "std": backbone.std, "interpolation": backbone.interpolation}
        view = View(size=backbone.image_size, crop_pct=backbone.crop_pct, **looks, **policy)
        return ImageSpec({IMAGE: view}, records=True, text=True)

    def defaults(self) -> dict[str, float]:
        # appendix A.1: one rate for ViT-B, another for ViT-L
        return {"epochs": 2, "batch_size": 49152, "lr": 2e-4 if self.image.backbone.embed_dim <= 768 else 4e-4}

    def enable_grad_checkpointing(self) -> None:
        self.checkpointing = True
        self.text.enable_grad_checkpointing()

    def enable_compile(self) -> None:
        super().enable_compile()
        self.text.enable_compile()

    def artifacts(self) -> dict[str, Any]:
        text: Any = self.text.model
        with torch.no_grad():
            text.logit_scale.fill_(self.log_scale)
        return {
            "backbone": self.image.backbone,
            "softcap": None,
            "embed": self.image.embed,
            "text": {"model": self.config.text, "pretrained": self.config.text_pretrained},
            "text_tower": text,
        }
