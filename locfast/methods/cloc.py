"""CLOC: contrastive localized language-image pre-training (section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from locfast.config.clip import MAX_SCALE
from locfast.config.cloc import ClocConfig
from locfast.data.spec import ImageSpec
from locfast.kernels.region_contrastive_loss import region_contrastive_loss
from locfast.methods import ranks
from locfast.methods.base import Batch
from locfast.methods.clip import IMAGE, Clip
from locfast.methods.region_prompts import RegionPrompts
from locfast.models.create import seeded
from locfast.models.prompter import BoxHead, CrossPrompter, Prompter, RoiPooler, wide
from locfast.random import Keys, uniform

PROMPTERS: dict[str, type[Prompter] | type[CrossPrompter]] = {"self": Prompter, "cross": CrossPrompter}
AT_A_TIME = 1 << 28
"""Numbers in the image tokens of the prompts that are computed at a time: 512 MiB of them in bf16, and four times that
inside an MLP. Few and large, because launching a prompt keeps a host busier than computing it an H200."""


class Draw(NamedTuple):
    """Places in [0, 1) on the CPU that choose a caption and M regions."""

    caption: Tensor  # [B]
    regions: Tensor  # [B, M]


class Tokens(NamedTuple):
    """Token ids on the method's device; phrases are short, and so is what they are padded to."""

    captions: Tensor  # [B, L] int64
    phrases: Tensor  # [U, L'] int64, distinct


class Embedded(NamedTuple):
    """A micro-batch in the joint space, and the boxes that its phrases were grounded to."""

    images: Tensor  # [B, E]
    texts: Tensor  # [B, E]
    regions: Tensor  # [B * M, E]
    phrases: Tensor  # [B * M, E]
    distance: Tensor  # scalar: the sum of equation 3's norms


@dataclass(frozen=True)
class RegionLook:
    """A micro-batch, embedded without gradients."""

    tokens: Tokens
    prompts: RegionPrompts
    embedded: Embedded


@dataclass(frozen=True)
class RegionShare:
    """What one micro-batch is told of the whole step's loss."""

    look: RegionLook
    parts: dict[str, Tensor]  # scalars of the whole step
    gradients: dict[str, Tensor]  # by field of Embedded, for this micro-batch's rows, times rounds and ranks
    scales: dict[str, Tensor]  # those of the logarithms of both scales, over this rank's rows, times ranks


class Cloc(Clip):
    """CLIP's loss, and two of regions: a region and its phrase are drawn together, and a phrase finds its box.

    The image is encoded once; a light prompter makes embeddings of its regions. All negatives are those of the global
    batch: micro-batches are embedded twice, as `Clip` does.

    Raises:
        UserError: as `Clip`.
    """

    name = "cloc"
    config: ClocConfig

    def __init__(
        self,
        config: ClocConfig,
        *,
        model: str,
        pretrained: bool = True,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        pretrained = pretrained and not config.from_scratch
        super().__init__(config, model=model, pretrained=pretrained, image_size=image_size, seed=seed)
        backbone, joint = self.image.backbone, self.text.joint_width
        if config.crop == "pad":  # exports and evaluations look at images in the same way
            backbone.crop_pct = 1.0
            backbone.model.pretrained_cfg.update(crop_mode="border", crop_pct=1.0)
        with seeded(seed):
            self.prompter: Prompter | CrossPrompter | RoiPooler
            if config.prompter == "roi":
                self.prompter = RoiPooler(backbone.embed_dim, joint, backbone.grid, size=config.roi_size)
            else:
                shape: dict[str, Any] = {"mlp_ratio": config.prompter_ratio, "frequencies": config.box_frequencies}
                shape["grid"] = backbone.grid if config.add_places else None
                self.prompter = PROMPTERS[config.prompter](backbone.embed_dim, joint, **shape)
        if config.grounding:
            with seeded(seed + 1):
                self.box_head = BoxHead(joint)
        start = torch.tensor(-math.log(config.region_temperature))
        self.region_log_scale = nn.Parameter(start, config.learn_temperature)
        self.train()

    def forward(self, batch: Batch, draw: Any) -> dict[str, Tensor]:
        """Equation 4 over the images and regions of all ranks and micro-batches of a step.

        In evaluation every batch stands alone, as in `Clip`.
        """
        share: RegionShare | None = batch.get("ahead")
        if share is not None:
            told, sent = share.parts, self._pass_on(batch, share)
            prompts = share.look.prompts
        else:
            image_tokens = self.encode(batch)  # queued before the host turns to texts and regions
            prompts = self.prompts(batch, draw)
            embedded = self.embed_regions(image_tokens, self.all_tokens(batch, draw, prompts), prompts)
            told, sent = self.losses(embedded, prompts.valid, self.totals([prompts]))
        loss = ranks.with_gradient(told["loss"], sent)
        return {**_detached(told), **self._temperatures(), **self._numbers(prompts), "loss": loss}

    def losses(self, own: Embedded, valid: Tensor, totals: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of equation 4, and a scalar whose gradient, averaged over ranks, is that of their sum.

        totals [3]: images, images with regions and regions of all ranks.
        """
        group = ranks.process_group(self.training)
        averaged = ranks.size(group)
        images, some, regions = totals.unbind()
        fixed = self.config.region_weight
        weight = some / images if fixed is None else torch.full_like(some, fixed)
        contrast = self.contrast(own.images, own.texts)
        region = region_contrastive_loss(
            own.regions, own.phrases, logit_scale=self.region_scale(), filter_threshold=self.config.filter_threshold,
            valid=valid, group=group,
        )  # fmt: skip
        # every rank tells its share times their number, and the mean over ranks, which is what is taken, is the sum
        grounding = averaged * own.distance / (4 * regions.clamp(min=1))
        told = {"clip": contrast, "region": region, "region_weight": weight}
        loss = contrast + weight * region
        sent = averaged * loss
        if self.config.grounding:
            told["grounding"], loss, sent = grounding, loss + weight * grounding, sent + weight * grounding
        return {"loss": loss, **told}, sent

    def totals(self, prompts: list[RegionPrompts]) -> Tensor:
        """Images, images with regions, regions: sums over micro-batches and ranks [3], fp32 on the device."""
        counts = [sum(numbers) for numbers in zip(*(one.counts for one in prompts), strict=True)]
        return ranks.total(self.upload(torch.tensor(counts, dtype=torch.float32)), ranks.process_group(self.training))

    def encode(self, batch: Batch) -> Tensor:
        """Tokens of the images behind the final norm [B, T, C]."""
        return self.image.backbone(batch["views"][IMAGE], checkpointing=self.checkpointing)

    def embed_regions(self, image_tokens: Tensor, tokens: Tokens, prompts: RegionPrompts) -> Embedded:
        """Embed images and every distinct text once, and prompt for the regions."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.text.frozen):
            captions, phrases = self.text(tokens.captions), self.text(tokens.phrases)[prompts.phrase_of]
        images = self.image.embed(image_tokens)
        dtype = torch.promote_types(images.dtype, captions.dtype)
        images, captions, phrases = images.to(dtype), captions.to(dtype), phrases.to(dtype)
        regions, distance = self.prompt(image_tokens, phrases, prompts)
        slots = (len(prompts.valid), captions.shape[1])
        return Embedded(
            images,
            captions,
            regions.new_zeros(slots, dtype=dtype).index_copy(0, prompts.slots, regions.to(dtype)),
            phrases.new_zeros(slots).index_copy(0, prompts.slots, phrases),
            distance,
        )

    def prompt(self, tokens: Tensor, phrases: Tensor, prompts: RegionPrompts) -> tuple[Tensor, Tensor]:
        """Region embeddings [P, E], and the sum over regions of how far phrases' boxes lie from theirs."""
        patches = tokens[:, self.image.num_prefix_tokens :]
        if len(prompts.images) < len(patches):
            patches = patches.index_select(0, prompts.images)
        asked = self.prompter.ask(patches)
        at_a_time = max(1, AT_A_TIME // (patches.shape[1] * patches.shape[2]))
        found, grounded = [], []
        parts = (x.split(at_a_time) for x in (prompts.rows, prompts.boxes, phrases))
        for rows, boxes, texts in zip(*parts, strict=True):
            found.append(self.prompter.boxes(asked, boxes, rows))
            if self.config.grounding and not isinstance(self.prompter, RoiPooler):
                grounded.append(self.prompter.phrases(asked, texts, rows))
        regions = torch.cat(found)
        if not grounded:
            return regions, regions.new_zeros((), dtype=torch.float32)
        apart = wide(self.box_head(torch.cat(grounded))) - prompts.boxes
        norm = (apart.square().sum(-1) + self.config.grounding_eps**2).sqrt()
        return regions, (norm * prompts.valid[prompts.slots]).sum()

    def look(self, batch: Batch, draw: Any) -> Any:
        image_tokens, prompts = self.encode(batch), self.prompts(batch, draw)
        tokens = self.all_tokens(batch, draw, prompts)
        return RegionLook(tokens, prompts, self.embed_regions(image_tokens, tokens, prompts))

    def weigh(self, looks: list[Any]) -> list[Any]:
        """The loss of a whole step, and what each micro-batch has to send back for its gradient."""
        frozen = ("texts", "phrases") if self.text.frozen else ()
        joined = {
            name: (sum if name == "distance" else torch.cat)([getattr(look.embedded, name) for look in looks])
            for name in Embedded._fields
        }
        whole = Embedded(**{name: x.requires_grad_(name not in frozen) for name, x in joined.items()})
        scales = {name: getattr(self, name) for name in ("log_scale", "region_log_scale")}
        trained = {**whole._asdict(), **scales}
        trained = {name: tensor for name, tensor in trained.items() if tensor.requires_grad}
        if not self.config.grounding:
            del trained["distance"]
        valid = torch.cat([look.prompts.valid for look in looks])
        with torch.enable_grad():
            told, sent = self.losses(whole, valid, self.totals([look.prompts for look in looks]))
        found = dict(zip(trained, torch.autograd.grad(sent, list(trained.values())), strict=True))
        rounds, told = len(looks), _detached(told)
        shares = []
        for number, look in enumerate(looks):
            gradients = {"distance": rounds * found["distance"]} if "distance" in found else {}
            for name in ("images", "texts", "regions", "phrases"):
                if name in found:
                    rows = [len(getattr(one.embedded, name)) for one in looks]
                    gradients[name] = rounds * wide(found[name].split(rows)[number])
            shares.append(RegionShare(look, told, gradients, {name: found[name] for name in scales if name in found}))
        return shares

    def _pass_on(self, batch: Batch, share: Any) -> Tensor:
        """A scalar with the gradient of this micro-batch's share of the step's loss."""
        look = share.look
        own = self.embed_regions(self.encode(batch), look.tokens, look.prompts)
        sent = sum((wide(getattr(own, name)) * gradient).sum() for name, gradient in share.gradients.items())
        return sent + sum(getattr(self, name) * gradient for name, gradient in share.scales.items())

    def prompts(self, batch: Batch, draw: Draw) -> RegionPrompts:
        """The regions that this step asks about."""
        limits = {"min_shown": self.config.min_shown, "min_side": self.config.min_side}
        return RegionPrompts.of(batch["records"], batch["geometry"][IMAGE], draw.regions, self.upload, **limits)

    def all_tokens(self, batch: Batch, draw: Draw, prompts: RegionPrompts) -> Tokens:
        """Of one caption a sample, and of the distinct phrases."""
        return Tokens(self.tokens(batch, draw.caption), self.upload(self.text.tokenize(prompts.phrases)))

    def _numbers(self, prompts: RegionPrompts) -> dict[str, Tensor]:
        """For the log: regions an image that were asked about, and that no view shows or that are none."""
        images, _, regions = prompts.counts
        numbers = {"regions": regions / images, "regions_dropped": sum(prompts.dropped.values()) / images}
        return {name: torch.full((), value, device=self.device) for name, value in numbers.items()}

    def _temperatures(self) -> dict[str, Tensor]:
        """For the log, where they are learned."""
        if not self.config.learn_temperature:
            return {}
        scales = {"temperature": self.scale(), "region_temperature": self.region_scale()}
        return {name: 1 / scale.detach() for name, scale in scales.items()}

    def region_scale(self) -> Tensor:
        """What cosines of regions and phrases are multiplied with."""
        with torch.no_grad():
            self.region_log_scale.clamp_(max=math.log(MAX_SCALE))
        return self.region_log_scale.exp()

    def draw(self, keys: Keys) -> Any:
        """Which caption and which regions of every sample a step takes."""
        return Draw(super().draw(keys), uniform(keys, "cloc.regions", self.config.regions))

    def notes(self, micro_batch: int, ranks: int, accumulation: int) -> list[str]:
        told = super().notes(micro_batch, ranks, accumulation)
        if not self.config.from_scratch:
            return told
        return [*told, "both towers start from the seed, with no weights of --model; --cloc.init pretrained takes them"]

    def parameter_groups(self) -> list[dict[str, Any]]:
        decay, groups = self.optim.weight_decay, super().parameter_groups()
        heads = [self.prompter, *([self.box_head] if self.config.grounding else [])]
        named = [(name, p) for head in heads for name, p in head.named_parameters() if p.requires_grad]
        spared = [p for name, p in named if (p.ndim < 2 or name.startswith("corners.")) and not self.optim.decay_all]
        matrices = [p for _, p in named if all(p is not other for other in spared)]
        groups += [{"params": matrices, "weight_decay": decay}, {"params": spared, "weight_decay": 0.0}]
        alone = {"params": [self.region_log_scale], "weight_decay": 0.0}
        return [*groups, alone] if self.config.learn_temperature else groups

    def _spec(self, **policy: Any) -> ImageSpec:
        spec = super()._spec(**policy)
        return ImageSpec(spec.views, records=True, text=True, regions=True)

    def validation_spec(self) -> ImageSpec:
        return self._spec(crop="pad" if self.config.crop == "pad" else "center")

    def defaults(self) -> dict[str, float]:
        return {"epochs": 1, "batch_size": 32768, "lr": 5e-4}  # table A, which counts steps: recipes have them

    def artifacts(self) -> dict[str, Any]:
        found = super().artifacts()
        with torch.no_grad():
            found["region_scale"] = float(self.region_scale())
        heads = {"prompter": self.prompter, **({"box_head": self.box_head} if self.config.grounding else {})}
        return {**found, **heads}


def _detached(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.detach() for name, part in parts.items()}
