"""The training loop of a fine-tuned classifier."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from locfast.data.loader import Loader
from locfast.data.sources.class_folder import ClassFolder
from locfast.data.spec import ImageSpec, View
from locfast.errors import UserError
from locfast.eval.finetuning.mixing import mix, torch_seed
from locfast.eval.finetuning.recipe import Recipe
from locfast.eval.global_ability.features import EVERY, Reading, Tower, image_features
from locfast.models.backbone import Backbone

log = logging.getLogger("locfast")

VIEW = "finetune"
CHECKED = 50
"""Steps between two looks at whether the loss is finite: each waits for the GPU."""


@dataclass(frozen=True)
class Trained:
    """What came of a fine-tuning, beside the weights."""

    steps: int
    last_loss: float
    """Of the last step, on mixed images and smoothed labels."""
    unreadable: dict[str, str]
    """Training files that could not be read; others stood in for them."""


def parameter_groups(classifier: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """timm's groups: rates fall by `layer_decay` from the head (1) down over the blocks to the patch embedding.

    No weight decay on tensors of one dimension, nor on what timm's model names (position embedding, CLS, registers).
    """
    return param_groups_layer_decay(
        classifier,
        weight_decay=recipe.weight_decay,
        no_weight_decay_list=classifier.no_weight_decay(),
        layer_decay=recipe.layer_decay,
    )


def training_view(view: View, recipe: Recipe) -> View:
    """Random resized crops with flips and RandAugment, at the size and the colours of the evaluation view."""
    return replace(view, crop="random_resized", crop_pct=1.0, flip=True, color=recipe.color)


def finetune(
    classifier: Any, source: ClassFolder, view: View, recipe: Recipe, reading: Reading, seed: int, name: str
) -> Trained:
    """Train every weight of `classifier`, a timm model, which ends in evaluation mode on the device.

    The samples' order, crops, colours, mixing and dropped paths follow from `seed` alone, so that models of one size
    see the very same images. Raises UserError where the loss is not finite.
    """
    classifier.to(reading.device).train()
    steps, warmup = recipe.steps(len(source))
    optimizer = torch.optim.AdamW(
        parameter_groups(classifier, recipe),
        lr=recipe.lr,
        betas=recipe.betas,
        fused=reading.device.type == "cuda",
    )
    schedule = CosineLRScheduler(
        optimizer, steps - warmup, recipe.min_lr, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    loader = Loader(
        source,
        ImageSpec({VIEW: training_view(view, recipe)}),
        seed=seed,
        workers=reading.workers,
        device=reading.device,
        decoder=reading.decoder,
    )
    labels = torch.from_numpy(source.labels).to(reading.device)
    start, told, loss = perf_counter(), perf_counter(), torch.tensor(0.0)
    with torch.random.fork_rng([reading.device] if reading.device.type == "cuda" else []):
        for step, batch in enumerate(loader.batches(_positions(steps, recipe.batch_size))):
            images, targets = mix(batch["views"][VIEW], labels[batch["index"]], len(source.classes), recipe, seed, step)
            schedule.step_update(step + 1)
            loss = _step(classifier, images, targets, optimizer, recipe, reading, (seed, step))
            if step % CHECKED == 0 or step + 1 == steps:
                _check(loss, name, step)
            if perf_counter() - told > EVERY:
                told, done = perf_counter(), step + 1
                rate = done * recipe.batch_size / (told - start)
                log.info("%s: step %d of %d, loss %.4f, %.0f images/s", name, done, steps, loss.item(), rate)
    classifier.eval()
    return Trained(steps, loss.item(), dict(loader.replaced.names))


def _step(
    classifier: Any,
    images: Tensor,
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    reading: Reading,
    at: tuple[int, int],
) -> Tensor:
    """One update from a whole batch, some images at a time; its mean loss, detached."""
    size = recipe.micro_batch or len(images)
    total = torch.zeros((), device=images.device)
    optimizer.zero_grad(set_to_none=True)
    for round_, (some, wanted) in enumerate(zip(images.split(size), targets.split(size), strict=True)):
        torch.manual_seed(torch_seed(*at, round_))
        with torch.autocast(reading.device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
            logits = classifier(some)
        loss = SoftTargetCrossEntropy()(logits.float(), wanted) * (len(some) / len(images))
        loss.backward()
        total += loss.detach()
    optimizer.step()
    return total


def predict(classifier: Any, backbone: Backbone, source: ClassFolder, reading: Reading, name: str) -> Any:
    """Logits of every readable image as `ImageFeatures` under `name`; the backbone's own evaluation transform."""
    tower = Tower(Backbone(classifier, backbone.name), None, classifier.forward_head)
    return image_features(source, {name: tower}, reading)


def _positions(steps: int, batch: int) -> Iterator[Tensor]:
    return (torch.arange(step * batch, (step + 1) * batch) for step in range(steps))


def _check(loss: Tensor, name: str, step: int) -> None:
    if not bool(loss.isfinite()):
        raise UserError(
            f"the loss of {name} is not finite at step {step}. Type a smaller --lr, or --precision fp32; models that "
            "were done before are in the results."
        )
