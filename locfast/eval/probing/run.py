"""From a backbone and labelled images to a probe's result."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from locfast.data.labelled import LabelledSplit
from locfast.errors import UserError
from locfast.eval.heads import HeadKind, Intervention, ProbeHead, Task
from locfast.eval.probing import cache
from locfast.eval.probing.gather import Backbones, Gathered, Keep, gather
from locfast.eval.probing.images import Images, whole_view
from locfast.eval.probing.results import HeadResult, Picture, ProbeResult, write_result
from locfast.eval.probing.settings import Settings
from locfast.eval.probing.training import Part, Trained, evaluate, train_heads
from locfast.models.backbone import Backbone

Autocast = Callable[[], AbstractContextManager[None]]

PICTURES = 8
"""Validation images whose patches a report shows."""
HELD_OUT_SEED = 0
"""Which training images are held out does not depend on a head's seed."""


def probe_backbone(
    backbone: Backbone,
    softcap: float | None,
    name: str,
    train: LabelledSplit,
    validation: LabelledSplit,
    settings: Settings,
    out: Path,
    *,
    device: torch.device,
    precision: str,
    machine: dict[str, str],
    model: str | None = None,
    keep: Keep = "auto",
    cache_folder: Path | None = None,
    workers: int | None = None,
    limit: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> ProbeResult:
    """Train heads on `train`, score them on `validation`, and write OUT/probe.json, counts/, heads/ and pictures/.

    model: what `name` is short for, a run's folder for example. limit: of each split, the first so many images. tell:
    is given lines for the user. Raises UserError where images, labels or settings do not allow it.
    """
    begun = time.monotonic()
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    backbone = backbone.to(device).eval()
    view = whole_view(backbone.image_size, backbone.mean, backbone.std, backbone.interpolation)
    sides = {"train": train, "validation": validation}
    images = {side: Images(split, view, device, workers, limit) for side, split in sides.items()}
    sees = _sees(backbone, softcap, settings, autocast, precision)
    gathered: dict[str, Gathered] = {}
    held = 0
    for side, some in images.items():
        gathered[side] = gather(some, sees, settings.labels, keep, cache_folder, held)
        held += gathered[side].on_device
        tell(f"{side}: {len(some)} images, features {gathered[side].how} ({gathered[side].seconds:.1f} s)")
    fit, choose, report = parts = _parts(gathered, settings)
    for which, part in (("validation", report), ("training", fit), ("held-out training", choose)):
        rows = part.rows.to(part.targets.whole.device)
        if not all(part.targets.say_something(task, rows) for task in settings.tasks):
            raise UserError(
                f"{train.name}: no {which} image has any class, {len(rows)} of them; are their label maps all 255?"
                + " A larger --held-out may have some." * (which == "held-out training")
            )
    trained: dict[int, list[Trained]] = {}
    seconds = {"features": sum(one.seconds for one in gathered.values()), "heads": 0.0, "scores": 0.0}

    def make(task: Task, kind: HeadKind, intervention: Intervention) -> ProbeHead:
        sizes = (backbone.embed_dim, len(train.classes), backbone.num_prefix_tokens, backbone.num_patches)
        return ProbeHead(kind, task, *sizes, backbone.num_heads, intervention)

    for seed in settings.seeds:
        start = time.monotonic()
        trained[seed] = train_heads(make, settings, seed, fit, choose, device, autocast)
        seconds["heads"] += time.monotonic() - start
        start = time.monotonic()
        for one, (scores, _) in zip(trained[seed], evaluate(trained[seed], report, device, autocast), strict=True):
            one.validation = scores
        seconds["scores"] += time.monotonic() - start
        tell(f"seed {seed}: {len(trained[seed])} heads trained")
    out.mkdir(parents=True, exist_ok=True)
    heads = [_write(one, seed, out) for seed, of_seed in trained.items() for one in of_seed]
    shares = gathered["validation"].targets.shares.cpu().numpy()
    np.savez_compressed(out / "shares.npz", shares=shares)
    pictures = _pictures(images["validation"], gathered["validation"], trained[settings.seeds[0]], out, autocast)
    seconds["all"] = time.monotonic() - begun
    told = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()}
    result = ProbeResult(
        model=name,
        softcap=softcap,
        data=train.name,
        layout=train.layout,
        classes=list(train.classes),
        things=None if train.things is None else sorted(train.things),
        unlabeled=train.unlabeled,
        grid=backbone.grid,
        image_size=backbone.image_size,
        images=dict(zip(("train", "selection", "validation"), (len(part.rows) for part in parts), strict=True)),
        settings={**told, "model": model or name, "precision": precision},
        machine=machine,
        seconds={part: round(value, 2) for part, value in seconds.items()},
        heads=heads,
        pictures=pictures,
        shares="shares.npz",
    )
    write_result(result, out)
    return result


def _sees(
    backbone: Backbone, softcap: float | None, settings: Settings, autocast: Autocast, precision: str
) -> Backbones:
    """The backbone's tokens behind its final norm, or what a control puts in their place."""

    def features(pixels: Tensor) -> Tensor:
        with autocast():
            return backbone.forward_features(pixels, softcap=softcap)

    def nothing(pixels: Tensor) -> Tensor:
        return pixels.new_zeros(len(pixels), backbone.num_tokens, backbone.embed_dim)

    key = {"model": cache.model_key(backbone), "softcap": softcap, "control": settings.control == "position"}
    featurize = nothing if settings.control == "position" else features
    return Backbones(
        featurize, backbone.num_tokens, backbone.embed_dim, backbone.patch_size, {**key, "precision": precision}
    )


def _parts(gathered: dict[str, Gathered], settings: Settings) -> tuple[Part, Part, Part]:
    """What heads train on, what chooses their epoch, and what is reported."""
    train, validation = gathered["train"], gathered["validation"]
    count = len(train.targets.whole)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    report = Part(validation.tokens, validation.targets, torch.arange(len(validation.targets.whole)))
    chosen = max(1, round(settings.held_out * count))
    if settings.protocol == "held-out" and chosen >= count:
        raise UserError(f"{count} training images, of which {chosen} would be held out: none is left to train on.")
    fit = order if settings.protocol == "paper" else order[chosen:].sort().values
    targets = train.targets
    if settings.control == "shuffled":  # within what is trained on: what chooses and what is reported stay as they are
        other = torch.arange(count)
        other[fit] = fit[torch.randperm(len(fit), generator=torch.Generator().manual_seed(HELD_OUT_SEED))]
        targets = targets.shuffled(other.to(targets.whole.device))
    held_out = Part(train.tokens, train.targets, order[:chosen].sort().values)
    return Part(train.tokens, targets, fit), report if settings.protocol == "paper" else held_out, report


def _write(one: Trained, seed: int, out: Path) -> HeadResult:
    from safetensors.torch import save_file

    assert one.selection is not None and one.validation is not None
    stem = "-".join([one.task, one.kind, *([] if one.intervention == "none" else [one.intervention]), str(seed)])
    counts = f"counts/{stem}.npz"
    one.validation.counts.write(out / counts)
    (out / "heads").mkdir(exist_ok=True)
    save_file({key: value.cpu().contiguous() for key, value in one.best.items()}, out / "heads" / f"{stem}.safetensors")
    return HeadResult(
        task=one.task,
        head=one.kind,
        intervention=one.intervention,
        seed=seed,
        epochs=one.epochs,
        best_epoch=one.best_epoch,
        selection=one.selection.macro,
        validation=one.validation.macro,
        classes=one.validation.classes,
        counts=counts,
    )


@torch.no_grad()
def _pictures(
    images: Images,
    gathered: Gathered,
    heads: list[Trained],
    out: Path,
    autocast: Autocast,
) -> list[Picture]:
    """The first validation images, and what local heads say of their patches."""
    rows = torch.arange(min(PICTURES, len(images)))
    batch = next(iter(images.batches([rows])))
    truth = [[torch.nonzero(patch).flatten().tolist() for patch in one] for one in gathered.targets.unions(rows).cpu()]
    _, tokens = next(iter(gathered.tokens.batches([rows])))
    local = [one for one in heads if one.task == "local" and one.intervention == "none"]
    with autocast():
        logits: dict[str, Tensor] = {one.kind: one.head.eval()(tokens).float().cpu() for one in local}
    majority = gathered.targets.local.ndim == 2
    likely = {kind: (found.softmax(-1) > 0.5) if majority else found > 0 for kind, found in logits.items()}
    mean, std = (torch.tensor(v, device=batch.pixels.device).view(3, 1, 1) for v in (images.view.mean, images.view.std))
    pixels = ((batch.pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    (out / "pictures").mkdir(exist_ok=True)
    made = []
    for row in rows.tolist():
        file = f"pictures/{row}.png"
        Image.fromarray(pixels[row]).save(out / file)
        told = {
            kind: [torch.nonzero(patch).flatten().tolist() for patch in found[row]] for kind, found in likely.items()
        }
        likeliest = {kind: found[row].argmax(-1).tolist() for kind, found in logits.items()}
        name = images.split.source.name(row)
        made.append(Picture(Path(name).name, file, truth[row], told, likeliest))
    return made
