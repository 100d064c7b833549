"""UTA, unmasked token alignment: a new ViT learns a frozen CLIP tower's tokens from the patches that it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from locfast.config.uta import UTAConfig
from locfast.data.spec import ImageSpec, View
from locfast.errors import UserError
from locfast.methods import masks
from locfast.methods.base import Batch, Method, Seen
from locfast.models.backbone import load_backbone
from locfast.models.drop_path import set_drop_path
from locfast.models.joint import JointTower, has_cls, joint_tower, load_tower, pool_by_cls, text_tower_of
from locfast.random import Keys

IMAGE = "image"
WIDE = 1024
"""From this width on, ViT-L, the paper hides more and EVA-02 drops paths."""


@dataclass(frozen=True)
class Draw:
    """The random numbers of one batch."""

    visible: Tensor  # [B, N] bool, as many in every image


class UTA(Method):
    """Trains a student on unmasked tokens alone, each aligned with the teacher's token at its place (section 2.2).

    The student's CLS token lands in the teacher's joint space, so the teacher's text tower classifies with it unseen.

    Raises:
        UserError: no teacher, one without a joint space of tokens, a student without a CLS token, other patches.
    """

    def __init__(
        self,
        config: UTAConfig,
        *,
        model: str,
        pretrained: bool = True,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.optim, self.model = config, config.optim, model
        if config.teacher is None:
            raise UserError(
                "UTA learns from a frozen CLIP image tower, and none was named. Add for example --uta.teacher "
                "eva_giant_patch14_clip_224.merged2b (the paper's), or --uta.teacher open_clip:ViT-L-14@openai."
            )
        self.teacher = load_tower(
            config.teacher, pretrained, projection=config.projection, seed=seed, flag="--uta.teacher"
        ).requires_grad_(False)
        self.student = self._new_student(pretrained and config.init == "pretrained", image_size, seed)
        backbone = self.student.backbone
        self._check_places()
        wide = backbone.embed_dim >= WIDE
        ratio = config.mask_ratio if config.mask_ratio is not None else 0.5 if wide else 0.4
        set_drop_path(backbone, config.drop_path if config.drop_path is not None else 0.1 if wide else 0.0)
        self.kept = round(backbone.num_patches * (1 - ratio))
        if not 0 < self.kept < backbone.num_patches:
            raise UserError(
                f"mask_ratio {ratio} of {backbone.num_patches} patches keeps {self.kept}; some must be kept and some "
                "hidden. Choose another --uta.mask-ratio."
            )
        if self._masks_tokens:
            self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02, generator=torch.Generator().manual_seed(seed))
        self.checkpointing = False
        self.train()

    def _new_student(self, pretrained: bool, image_size: int | None, seed: int) -> JointTower:
        backbone = load_backbone(self.model, pretrained, seed=seed, image_size=image_size)
        if not has_cls(backbone):
            raise UserError(
                f"--model {self.model} has no CLS token, which in UTA stands for the image. Take an EVA-02 or a plain "
                "ViT, for example eva02_base_patch14_224."
            )
        if not pretrained:  # a network that has seen nothing sees images as its teacher does
            backbone.mean, backbone.std = self.teacher.mean, self.teacher.std
            backbone.model.pretrained_cfg.update(mean=self.teacher.mean, std=self.teacher.std)
        pool_by_cls(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone.model.head = nn.Linear(backbone.embed_dim, self.teacher.joint_dim)
            nn.init.trunc_normal_(backbone.model.head.weight, std=0.02)
            nn.init.zeros_(backbone.model.head.bias)
        return joint_tower(backbone, self.model, "--model")

    def _check_places(self) -> None:
        ours, theirs = self.student, self.teacher
        if (ours.grid, ours.image_size) != (theirs.grid, theirs.image_size):
            raise UserError(
                f"--model {self.model} cuts {ours.image_size} px into {ours.grid} patches and --uta.teacher "
                f"{self.config.teacher} {theirs.image_size} px into {theirs.grid}: tokens are aligned place by place. "
                "Take a student of the teacher's patch size and, where need be, --image-size."
            )

    @property
    def _masks_tokens(self) -> bool:
        return self.config.objective in ("mim", "uta_mim")

    def forward(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """The negative cosine between the two towers' tokens, the mean over images and aligned tokens, fp32."""
        images, places = batch["views"][IMAGE], self.aligned(draw.visible)
        target = take(self.target(images), places)
        predicted = self.student.project(self.tokens(images, draw.visible, places))
        cosine = F.cosine_similarity(predicted.float(), target.float(), dim=-1)
        patches = cosine if self.config.objective == "mim" else cosine[:, 1:]
        parts = {"cosine/patches": patches.detach().mean()}
        if self.config.objective != "mim":
            parts["cosine/cls"] = cosine[:, 0].detach().mean()
        return {"loss": -cosine.mean(), **parts}

    def aligned(self, visible: Tensor) -> Tensor:
        """Which tokens the loss compares, 0 for CLS and 1 + n for patch n: visible [B, N] bool -> [B, M] int64."""
        if self.config.objective in ("distillation", "uta_mim"):
            return torch.arange(1 + visible.shape[1], device=visible.device).expand(len(visible), -1)
        if self.config.objective == "mim":
            return 1 + masks.indices(~visible, visible.shape[1] - self.kept)
        return F.pad(1 + masks.indices(visible, self.kept), (1, 0))

    def tokens(self, images: Tensor, visible: Tensor, places: Tensor) -> Tensor:
        """The student's tokens at `places`, behind its final norm, from what it is shown: [B, M, C]."""
        backbone, again = self.student.backbone, self.checkpointing
        if self.config.objective == "uta":
            return cls_and_patches(
                backbone.forward_features(images, checkpointing=again, kept=places[:, 1:] - 1), backbone
            )
        patches = backbone.embed_patches(images)
        if self._masks_tokens:
            patches = torch.where(visible[..., None], patches, self.mask_token.to(patches.dtype))
        return take(cls_and_patches(backbone.encode(patches, checkpointing=again), backbone), places)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """The teacher's CLS and patch tokens of the whole image, in the joint space: [B, 1 + N, E]."""
        student, teacher = self.student, self.teacher
        if (student.mean, student.std) != (teacher.mean, teacher.std):
            seen = [torch.tensor(side, device=images.device).view(3, 1, 1) for side in (student.mean, student.std)]
            wanted = [torch.tensor(side, device=images.device).view(3, 1, 1) for side in (teacher.mean, teacher.std)]
            images = (images * seen[1] + seen[0] - wanted[0]) / wanted[1]
        return cls_and_patches(teacher(images), teacher)

    def student_flops(self, samples: int = 1) -> int:
        """FLOPs of the student's forward and backward pass on `samples` images, counted operation by operation."""
        images = torch.zeros(samples, 3, *self.student.image_size, device=self.device)
        visible = torch.arange(self.student.backbone.num_patches, device=self.device).expand(samples, -1) < self.kept
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        with FlopCounterMode(display=False) as counter:
            predicted = self.student.project(self.tokens(images, visible, self.aligned(visible)))
            torch.autograd.grad(predicted.sum(), parameters, allow_unused=True)
        return counter.get_total_flops()

    def seen(self, batch: Batch, draw: Draw) -> dict[str, Seen]:
        if self.config.objective == "distillation":
            return super().seen(batch, draw)
        visible = draw.visible.unflatten(-1, self.student.grid)[:, None]
        return {IMAGE: Seen(batch["views"][IMAGE], visible, ("student",))}

    def draw(self, keys: Keys) -> Draw:
        return Draw(masks.exact(keys, self.student.grid, self.kept, self.config.masking))

    def image_spec(self) -> ImageSpec:
        config = self.config
        return ImageSpec({IMAGE: self._view(crop=config.crop, scale=config.crop_scale, flip=config.flip)})

    def validation_spec(self) -> ImageSpec:
        return ImageSpec({IMAGE: self._view(crop="center", crop_pct=self.student.backbone.crop_pct)})

    def _view(self, **policy: Any) -> View:
        student = self.student
        look = {"size": student.image_size, "mean": student.mean, "std": student.std}
        return View(**{**look, "interpolation": self.teacher.interpolation, **policy})

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        self.student.backbone.check_uncapped("sdpa", device, dtype)

    def defaults(self) -> dict[str, float]:
        return {"epochs": 150, "batch_size": 4096, "lr": 1.5e-3}

    def undecayed(self) -> set[str]:
        """Positions and prefix tokens: EVA-02's list, which is timm's."""
        return {f"student.backbone.model.{name}" for name in self.student.backbone.model.no_weight_decay()}

    def enable_grad_checkpointing(self) -> None:
        self.checkpointing = True

    def artifacts(self) -> dict[str, Any]:
        backbone = self.student.backbone
        text = text_tower_of(str(self.config.teacher))
        return {"backbone": backbone, "softcap": None, "embed": self.student.embed, "text": text}

    def train(self, mode: bool = True) -> UTA:
        super().train(mode)
        self.teacher.eval()
        return self


def cls_and_patches(tokens: Tensor, tower: Any) -> Tensor:
    """Tokens [B, P + M, ...] without registers: the CLS token and the patches, [B, 1 + M, ...]."""
    prefix = tower.num_prefix_tokens
    return tokens if prefix == 1 else torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """tokens [B, T, C] at places [B, M] -> [B, M, C]."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
