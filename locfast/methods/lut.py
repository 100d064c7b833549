"""LUT, learning with unmasked tokens: masked autoencoding and a context for the visible tokens (LUT, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locfast.config.lut import LUTConfig
from locfast.data.spec import ImageSpec, View
from locfast.errors import UserError
from locfast.kernels import _backend
from locfast.kernels.reconstruction_loss import reconstruction_loss
from locfast.methods import masks
from locfast.methods.base import Batch, Method, Seen
from locfast.methods.context_loss import distance, spread
from locfast.methods.mask_units import MaskUnits
from locfast.models.backbone import Backbone, load_backbone
from locfast.models.create import seeded
from locfast.models.masked_autoencoder import Masked, MaskedAutoencoder, MaskTokenAutoencoder, take
from locfast.models.momentum_encoder import MomentumCopy, momentum_at
from locfast.models.pixel_decoder import patch_pixels
from locfast.models.projection_head import ProjectionHead
from locfast.models.scratch import fix_positions, start_from_scratch
from locfast.random import Keys

IMAGE, CONTEXT = "image", "context"


@dataclass(frozen=True)
class Draw:
    """The random numbers of one batch; S masked views (1, or 2 in the reference's form), as many whole ones."""

    visible: Tensor  # [B, S, N] bool, equally many in every row
    target_visible: Tensor | None = None  # [B, S, N] bool; None: the momentum encoder sees all


class LUT(Method):
    """Trains an encoder to rebuild hidden patches, while its visible tokens follow the context of another view.

    A momentum encoder sees that view whole. `--lut.form reference` does so both ways.

    Raises:
        UserError: a mask ratio that leaves no patch hidden or none visible on this grid; squares that do not tile it;
            CLS as context without a CLS token; sin-cos positions for a model that has none of its own.
    """

    moving = ("momentum",)

    def __init__(
        self,
        config: LUTConfig,
        *,
        model: str,
        pretrained: bool = True,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.optim = config, config.optim
        scratch = config.init == "scratch"
        encoder = load_backbone(model, pretrained and not scratch, seed=seed, image_size=image_size)
        if config.context_tokens == "cls" and encoder.num_prefix_tokens == 0:
            raise UserError(
                f"context_tokens cls was asked for, but {model} has no CLS token; use --lut.context-tokens pooled"
            )
        width = encoder.embed_dim
        self.weight = (1.0 if width <= 384 else 0.25) if config.context_weight is None else config.context_weight
        self.units = MaskUnits(model, encoder.grid, config.unit)
        self.num_visible = self.units.visible(config.hidden_share, "lut.mask-ratio", True, len(self._pairs))
        self.num_target = self.units.visible(config.target_mask_ratio, "lut.target-mask-ratio", False)
        kinds = {"both": ["context", "token"]}.get(config.supervision, [config.supervision]) if self.weight else []
        with seeded(seed):
            if scratch:
                start_from_scratch(encoder)
            if config.has_sincos_positions:
                fix_positions(encoder)
            self.autoencoder: Any = self._new_autoencoder(encoder)
            self.heads = nn.ModuleDict({kind: ProjectionHead(width, config.head_width) for kind in kinds})
            self.predictors = nn.ModuleDict()
            for kind in kinds:
                self.predictors[kind] = ProjectionHead(width, config.head_width) if config.predictor else nn.Identity()
        self.momentum: Any = MomentumCopy(self._followed)

    def _new_autoencoder(self, encoder: Backbone) -> MaskedAutoencoder | MaskTokenAutoencoder:
        config, with_hidden = self.config, self.config.steer == "all"
        if config.encoding == "mask_tokens":
            return MaskTokenAutoencoder(encoder, with_hidden)
        sizes = (config.decoder_width, config.decoder_depth, config.decoder_heads)
        return MaskedAutoencoder(encoder, *sizes, with_hidden)

    @property
    def encoder(self) -> Backbone:
        """The network that an export holds."""
        return self.autoencoder.encoder

    @property
    def _followed(self) -> dict[str, nn.Module]:
        """What the momentum encoder is a moving average of; decoder and predictors are the encoder's alone."""
        return {"encoder": self.encoder, "heads": self.heads} if self.weight else {}

    @property
    def _pairs(self) -> list[tuple[str, str]]:
        """(view that is masked, view that gives its context), the one that is rebuilt first."""
        one_way = self.config.form == "paper" or not self.weight
        return [(IMAGE, CONTEXT)] if one_way else [(IMAGE, CONTEXT), (CONTEXT, IMAGE)]

    def forward(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Equation 3, L_MIM + alpha L_BC: means over images; of the one, over hidden patches and their pixels too."""
        views = batch["views"]
        masked = [self.encode(views[own], draw.visible[:, i], i == 0) for i, (own, _) in enumerate(self._pairs)]
        reconstruction = self.reconstruction(masked[0], views[IMAGE], draw.visible[:, 0])
        parts = {
            "loss/reconstruction": reconstruction.detach(),
            "spread": spread(self._summary(masked[0].tokens, masked[0].patches)),
        }
        if not self.weight:
            return {"loss": reconstruction, **parts}
        whole = [self.look_at(views[other], draw.target_visible, i) for i, (_, other) in enumerate(self._pairs)]
        context = torch.stack([self.context(*pair) for pair in zip(masked, whole, strict=True)]).mean()
        return {"loss": reconstruction + self.weight * context, "loss/context": context.detach(), **parts}

    def alone(self, batch: Batch, draw: Draw) -> Tensor:
        """In eval mode: one image has no statistics of its own, and no negatives."""
        was_training = self.training
        try:
            return self.eval()(batch, draw)["loss"]
        finally:
            self.train(was_training)

    def encode(self, images: Tensor, visible: Tensor, rebuild: bool) -> Masked:
        """A masked view, images [B, 3, H, W] and visible [B, N] bool, through the encoder; rebuild: then to pixels."""
        kept = masks.indices(visible, self.units.patches(self.num_visible))
        return self.autoencoder(images, visible, kept, rebuild)

    @torch.no_grad()
    def look_at(self, images: Tensor, visible: Tensor | None, number: int) -> Tensor:
        """What the momentum encoder makes of a view: [B, 3, H, W] -> [B, P + N, C], or of visible patches alone."""
        kept = None if visible is None else masks.indices(visible[:, number], self.units.patches(self.num_target))
        return self.momentum.encoder(images, kept=kept)

    def reconstruction(self, masked: Masked, images: Tensor, visible: Tensor) -> Tensor:
        """L_MIM, equation 1: the mean squared (SimMIM: absolute) error of the pixels of hidden patches; a scalar."""
        assert masked.pixels is not None
        target = patch_pixels(images, self.encoder.patch_size, self.config.normalises_pixels)
        kind = "mse" if self.config.encoding == "drop" else "l1"
        pixels, target, visible = masked.pixels[:, None], target[:, None], visible[:, None]
        return reconstruction_loss(pixels, target, target.new_ones(()), visible, loss=kind, loss_on="hidden")[0]

    def context(self, masked: Masked, whole: Tensor) -> Tensor:
        """L_BC: how far the visible tokens, or their mean, are from what the momentum encoder saw; a scalar."""
        config = self.config
        patches = whole[:, self.encoder.num_prefix_tokens :]
        losses = []
        for kind, head in self.heads.items():
            if kind == "context":
                own, other = self._summary(masked.tokens, masked.patches), self._summary(whole, patches)
            else:
                own, other = masked.patches, patches if config.steer == "all" else take(patches, masked.kept)
            prediction = self.predictors[kind](head(own)).flatten(0, -2)
            with torch.no_grad():
                target = self.momentum.heads[kind](other).flatten(0, -2)
            losses.append(distance(prediction, target, config.distance, config.temperature, self.training))
        return torch.stack(losses).mean()

    def _summary(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """One vector [B, C] for a view: the mean of its patch tokens, or its CLS token."""
        return tokens[:, 0] if self.config.context_tokens == "cls" else patches.mean(1)

    def draw(self, keys: Keys) -> Draw:
        visible = self.units.draw(keys, self.num_visible, len(self._pairs))
        if self.config.target_mask_ratio == 0:
            return Draw(visible)
        streams = [f"lut.target.{other}" for _, other in self._pairs]
        return Draw(visible, self.units.draw_apart(keys, self.num_target, streams))

    def after_step(self, step: int, steps: int) -> None:
        if self.weight:
            momentum = momentum_at(step, steps, self.config.momentum, self.config.last_momentum)
            self.momentum.follow(self._followed, momentum)

    def seen(self, batch: Batch, draw: Draw) -> dict[str, Seen]:
        shown: dict[str, dict[str, Tensor]] = {name: {} for name in batch["views"]}
        for i, (own, other) in enumerate(self._pairs):
            shown[own]["visible"] = draw.visible[:, i]
            if draw.target_visible is not None and self.weight:
                shown[other]["target"] = draw.target_visible[:, i]
        return {name: self._seen(batch["views"][name], some) for name, some in shown.items()}

    def _seen(self, images: Tensor, shown: dict[str, Tensor]) -> Seen:
        if not shown:
            return Seen(images)
        return Seen(images, torch.stack(list(shown.values()), 1).unflatten(-1, self.encoder.grid), tuple(shown))

    def notes(self, micro_batch: int, ranks: int, accumulation: int) -> list[str]:
        config, images = self.config, micro_batch * ranks
        if images == 1 and "context" in self.heads:
            raise UserError(
                "lut normalises the contexts of a batch by their mean and variance, so its networks need two images at "
                "a time at least, over all ranks; got one. Use --micro-batch 2 or more."
            )
        if accumulation == 1:
            return []
        told = [
            f"batch norm in the heads is per micro-batch: it sees {images} of the {images * accumulation} images of a "
            "step at a time, so the curve depends on --micro-batch"
        ]
        if config.distance == "info_nce":
            told.append(f"info_nce finds its negatives in the same {images} images")
        return told

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        _backend.check("reconstruction_loss", device, dtype)

    def image_spec(self) -> ImageSpec:
        config = self.config
        crop: dict[str, Any] = {"crop": config.crop, "flip": config.flip}
        if config.crop == "random_resized":
            crop["scale"] = config.crop_scale
        views = {IMAGE: self._view(**crop), CONTEXT: self._view(**crop, color=config.color)}
        return ImageSpec(views if self.weight else {IMAGE: views[IMAGE]})

    def validation_spec(self) -> ImageSpec:
        crop = {"crop": "center", "crop_pct": self.encoder.crop_pct}
        return ImageSpec({name: self._view(**crop) for name in self.image_spec().views})

    def _view(self, **policy: Any) -> View:
        encoder = self.encoder
        return View(
            size=encoder.image_size,
            mean=encoder.mean,
            std=encoder.std,
            interpolation=encoder.interpolation,  # type: ignore[arg-type]  # one of timm's names, checked there
            **policy,
        )

    def defaults(self) -> dict[str, float]:
        # section 5.1; the paper's 1.5e-4 is MAE's base rate, of 256 images
        return {"epochs": 1600, "batch_size": 4096, "lr": 1.5e-4 * 4096 / 256}

    def enable_grad_checkpointing(self) -> None:
        self.autoencoder.checkpointing = True

    def artifacts(self) -> dict[str, Any]:
        return {"backbone": self.encoder, "softcap": None}
