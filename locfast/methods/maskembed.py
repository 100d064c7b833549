"""MaskEmbed, or masked embedding self-consistency (Locality Alignment, section 3.2 and appendix C)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locfast.config.maskembed import MaskEmbedConfig
from locfast.data.spec import ImageSpec, View
from locfast.errors import UserError
from locfast.kernels import _backend
from locfast.kernels.reconstruction_loss import reconstruction_loss
from locfast.methods import masks
from locfast.methods.base import Batch, Method, Seen
from locfast.methods.mixing import Mix, draw_mix, mix_images
from locfast.models.backbone import load_backbone
from locfast.models.decoder import PooledDecoder, TransformerDecoder
from locfast.models.fp8 import check_fp8, quantise_blocks
from locfast.models.softcap import set_softcap
from locfast.models.student import make_student
from locfast.models.teacher import TeacherPass
from locfast.random import Keys

IMAGE = "image"


@dataclass(frozen=True)
class Draw:
    """The random numbers of one batch."""

    visible: Tensor  # [B, V, N] bool
    mix: Mix | None = None


class MaskEmbed(Method):
    """Fine-tunes an encoder so that its masked patch embeddings suffice to rebuild a frozen teacher's masked outputs.

    The encoder sees the whole image; its embeddings are masked afterwards, so every one must hold what is at its place.

    Raises:
        UserError: the model has no CLS token but the target is its CLS; its attention cannot be capped, or its blocks
            cannot run in fp8, and the config asks for it.
    """

    preparation_samples = 4096
    target_scale: Tensor
    """One over the targets' standard deviation; 1 before `prepare`."""

    def __init__(
        self,
        config: MaskEmbedConfig,
        *,
        model: str,
        pretrained: bool = True,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.optim = config.optim
        self.teacher = load_backbone(model, pretrained, seed=seed, image_size=image_size).requires_grad_(False)
        if config.target == "last_cls" and self.teacher.num_prefix_tokens == 0:
            raise UserError(
                f"target last_cls was asked for, but {model} has no CLS token; use --maskembed.target penultimate"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = make_student(
                copy.deepcopy(self.teacher), new_norm=config.reinit_norm, new_last_block=config.reinit_last_block
            )
            self.encoder = set_softcap(student, config.softcap)
            self.head = self._new_head()
            self.decoder = self._new_decoder()
        if config.teacher_precision == "fp8":  # now that the student has its copy
            quantise_blocks(self.teacher, self._stop)
        self.teacher_pass = TeacherPass(
            self.teacher, self._stop, config.uncapped_attention, config.teacher_chunk, config.teacher_graph
        )
        self.register_buffer("target_scale", torch.ones(()))
        self.checkpointing = False
        self.train()

    def _new_head(self) -> nn.Module:
        width = self.teacher.embed_dim
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return last if self.config.head == "linear" else nn.Sequential(nn.Linear(width, width), nn.GELU(), last)

    def _new_decoder(self) -> nn.Module:
        if self.config.decoder == "transformer":
            depth, layer_scale = self.config.decoder_depth, self.config.decoder_layer_scale
            return TransformerDecoder(self.teacher, depth, layer_scale, self.config.uncapped_attention)
        return PooledDecoder(average=self.config.decoder == "average")

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.config.softcap is not None:
            plain_because = "it takes no bias" if self.encoder.has_position_bias else ""
            _backend.check("softcap_attention", device, dtype, plain_because)
        if self.config.decoder == "transformer":
            _backend.check("mask_embeddings", device, dtype)
        _backend.check("select_views", device, dtype)
        _backend.check("reconstruction_loss", device, dtype)
        if self.config.teacher_precision == "fp8":
            check_fp8(device, dtype)
        self.teacher.check_uncapped(self.config.uncapped_attention, device, dtype)
        self.teacher_pass.check(device)

    def forward(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Equation 1: the squared distance of h(m(g(x))) from f(m(x)), the mean over images, views, tokens, width."""
        images = mix_images(batch["views"][IMAGE], draw.mix)
        target = self.target(images, draw.visible)
        features = self.encoder(images, checkpointing=self.checkpointing, uncapped=self.config.uncapped_attention)
        embeddings = self.head(features)
        rebuilt = self.decoder(embeddings[:, self.encoder.num_prefix_tokens :], draw.visible, self.checkpointing)
        loss, per_token = reconstruction_loss(
            rebuilt[:, :, : target.shape[2]],
            target,
            self.target_scale,
            draw.visible,
            loss=self.config.loss,
            loss_on=self.config.loss_on,
        )
        return {"loss": loss, **self._view_losses(per_token.detach())}

    def target(self, images: Tensor, visible: Tensor) -> Tensor:
        """What the teacher makes of every masked view, before scaling; no gradient passes through it.

        images [B, 3, H, W], visible [B, V, N] bool  ->  [B, V, T, C]; T is 1, the CLS token, for target last_cls.
        """
        features = self.teacher_pass(images, visible)
        return features[:, :, :1] if self.config.target == "last_cls" else features

    @property
    def _stop(self) -> int:
        """How many of the teacher's blocks run."""
        return self.teacher.depth - (self.config.target == "penultimate")

    def _view_losses(self, per_token: Tensor) -> dict[str, Tensor]:
        return {f"loss/{name}": per_token[:, view].mean() for view, name in enumerate(self._masks)}

    @property
    def _masks(self) -> tuple[str, ...]:
        return ("masked", *["complement"] * self.config.complement, *["all_visible"] * self.config.all_visible)

    def seen(self, batch: Batch, draw: Draw) -> dict[str, Seen]:
        visible = draw.visible.unflatten(-1, self.teacher.grid)
        return {IMAGE: Seen(mix_images(batch["views"][IMAGE], draw.mix), visible, self._masks)}

    def draw(self, keys: Keys) -> Draw:
        config, grid = self.config, self.teacher.grid
        if config.masking == "uniform":
            visible = masks.uniform_count(keys, self.teacher.num_patches)
        elif config.masking == "bernoulli":
            visible = masks.bernoulli(keys, self.teacher.num_patches, config.bernoulli_p)
        else:
            visible = masks.blocks(keys, grid, config.block_fraction)
            visible = ~visible if config.masking == "reversed_block" else visible
        views = masks.with_views(visible, config.complement, config.all_visible)
        return Draw(views, draw_mix(keys, config.mixup, config.cutmix) if self.training else None)

    @torch.no_grad()
    def prepare(self, batches: Iterable[tuple[Batch, Draw]], reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Set `target_scale` to one over the targets' standard deviation, summed in fp64 over samples and ranks."""
        if not self.config.target_scale or self.config.loss == "cosine":
            return
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # how many, their sum, their squares' sum
        for batch, draw in batches:
            target = self.target(batch["views"][IMAGE], draw.visible).double()
            sums += torch.stack([target.new_tensor(target.numel()), target.sum(), target.square().sum()])
        count, total, squares = reduce_sum(sums).unbind()
        variance = squares / count - (total / count) ** 2
        self.target_scale.copy_(variance.rsqrt())

    def image_spec(self) -> ImageSpec:
        config = self.config
        crop = {"crop": config.crop, "flip": config.flip, "interpolation": "random", "color": config.randaugment}
        return ImageSpec({IMAGE: self._view(**crop)})

    def validation_spec(self) -> ImageSpec:
        return ImageSpec({IMAGE: self._view(crop="center", crop_pct=self.teacher.crop_pct)})

    def _view(self, **policy: Any) -> View:
        backbone = self.teacher
        return View(
            **{
                "size": backbone.image_size,
                "mean": backbone.mean,
                "std": backbone.std,
                "interpolation": backbone.interpolation,
                **policy,
            }
        )

    def defaults(self) -> dict[str, float]:
        # Table 6: 3e-4 up to ViT-B, 2e-4 for ViT-L and SO400M.
        return {"epochs": 5, "batch_size": 1024, "lr": 3e-4 if self.teacher.embed_dim <= 768 else 2e-4}

    def enable_grad_checkpointing(self) -> None:
        self.checkpointing = True

    def artifacts(self) -> dict[str, Any]:
        return {"backbone": self.encoder, "softcap": self.config.softcap, "head": self.head, "decoder": self.decoder}

    def train(self, mode: bool = True) -> MaskEmbed:
        super().train(mode)
        self.teacher.eval()
        return self
