"""End-to-end fine-tuning: every weight learns the classes, by the recipe of LUT's table D (MAE's).

Defaults follow the width of the model: up to 384 (S) 300 epochs, --lr 5e-4, --layer-decay 0.75; up to 768 (B) 100,
2.5e-4, 0.65; beyond (L) 50, 1e-3, 0.65. --lr is a base rate, as the paper and MAE have it: the rate itself is --lr
times --batch-size / 256. Models learn from the same images in the same order with the same crops and mixing. The
weights after the last epoch are reported: validation images choose nothing.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.eval.commands import shared

if TYPE_CHECKING:
    from locfast.eval.finetuning.recipe import Recipe

WEIGHTS = "weights"
JUDGED = 128
"""Validation images in a batch at most, whatever the batch of training."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_models(parser)
    shared.add_data(parser, train=True, pools=("mean", "cls"), pool_default="mean, with a fresh norm")
    parser.set_defaults(batch_size=1024)
    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=float, help="default: by width, see above")
    group.add_argument("--lr", type=float, help="base rate, for batches of 256; default: by width")
    group.add_argument("--layer-decay", type=float, help="factor of the rate from a block to the one below; by width")
    group.add_argument("--warmup", type=float, default=5.0, help="epochs (default 5)")
    group.add_argument("--min-lr", type=float, default=1e-6, help="at the cosine's end (default 1e-6)")
    group.add_argument("--micro-batch", type=int, help="images at a time, accumulated; default: the whole batch")
    group.add_argument("--weight-decay", type=float, default=0.05, help="not of 1-D tensors (default 0.05)")
    group.add_argument("--drop-path", type=float, default=0.1, help="of the last block, rising from 0 (default 0.1)")
    group.add_argument("--smoothing", type=float, default=0.1, help="of labels (default 0.1)")
    group.add_argument("--mixup", type=float, default=0.8, help="alpha; 0: none (default 0.8)")
    group.add_argument("--cutmix", type=float, default=1.0, help="alpha; 0: none (default 1)")
    group.add_argument(
        "--rand-augment", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's string, or none (%(default)s)"
    )
    group.add_argument("--save", action="store_true", help=f"keep the trained classifiers, in OUT/{WEIGHTS}/MODEL")


def run(args: argparse.Namespace) -> int:
    import torch

    from locfast.data.sources import ClassFolder
    from locfast.data.sources.class_folder import check_same_classes
    from locfast.errors import UserError
    from locfast.eval.commands.models import Models
    from locfast.eval.finetuning.training import finetune, predict
    from locfast.eval.global_ability.features import Features, evaluation_view
    from locfast.eval.global_ability.pooling import pick_pool
    from locfast.eval.global_ability.results import check_out, scores
    from locfast.models.classifier import make_classifier, write_classifier

    shared.tell_progress()
    reading = shared.reading(args)
    train, val = ClassFolder(args.train), ClassFolder(args.val)
    check_same_classes(train, val)
    if args.batch_size > len(train):
        raise UserError(
            f"--batch-size {args.batch_size}: there are {len(train)} training images. Type --batch-size "
            f"{len(train) - len(train) % 2} or less."
        )
    _check(_recipe(args, 1))
    check_out(args.out, args.overwrite)
    models = Models(args)
    pool: Any = args.pool or "mean"
    for name, subject in models:
        pick_pool(subject.backbone, pool, name)
    predicted: dict[str, Any] = {}
    details: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    judging = replace(reading, batch_size=min(reading.batch_size, args.micro_batch or JUDGED, JUDGED))
    for name, subject in models:
        recipe = _recipe(args, subject.backbone.embed_dim)
        classifier = make_classifier(
            *(subject.backbone, subject.softcap, len(train.classes)),
            pool=pool,
            drop_path=recipe.drop_path,
            seed=args.seed,
        )
        made = finetune(classifier, train, evaluation_view(subject.backbone), recipe, reading, args.seed, name)
        read = predict(classifier, subject.backbone, val, judging, name)
        predicted[name] = read.features[name].argmax(1)
        details[name] = {"recipe": asdict(recipe), "lr": recipe.lr, "steps": made.steps, "last_loss": made.last_loss}
        if args.save:
            folders[name] = args.out / WEIGHTS / _file_name(name, [folder.name for folder in folders.values()])
            details[name]["saved"] = str(folders[name])
        left = torch.zeros(len(train) - len(made.unreadable))
        splits = {"train": (train, Features({}, left, made.unreadable, [])), "val": (val, read)}
        found = scores(
            "fine-tuned",
            predicted,
            read.labels,
            val.classes,
            {one: other for one, other in models.against.items() if one in predicted and other in predicted},
            seed=args.seed,
            details=details,
        )
        settings = {"device": str(reading.device), "precision": reading.precision, "pool": pool}
        # After every model, so that Ctrl-C during the next one loses nothing of this one.
        shared.keep(args, "finetune", found, models, splits, settings, [])
        if args.save:
            score = next(one for one in found if one.model == name)
            told = f"{name}, {recipe.epochs:g} epochs on {len(train)} images of {len(train.classes)} classes: "
            told += f"{100 * score.accuracy:.2f} % top-1 on {len(read)} validation images."
            write_classifier(classifier, subject.backbone, folders[name], train.classes, told)
        del classifier
    shared.finish(args, "finetune", found, models, splits, settings, [])
    return 0


def _check(recipe: Recipe) -> None:
    """A bad policy is told before models are loaded and before anything is made, as bad numbers are."""
    from locfast.data.augment import Augment
    from locfast.data.spec import View

    if recipe.color is not None:
        Augment(View((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), color=recipe.color))


def _recipe(args: argparse.Namespace, embed_dim: int) -> Recipe:
    from locfast.eval.finetuning.recipe import SIZES, Recipe, size_of

    epochs, base_lr, layer_decay = SIZES[size_of(embed_dim)]
    return Recipe(
        epochs=epochs if args.epochs is None else args.epochs,
        base_lr=base_lr if args.lr is None else args.lr,
        layer_decay=layer_decay if args.layer_decay is None else args.layer_decay,
        warmup=args.warmup,
        min_lr=args.min_lr,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        weight_decay=args.weight_decay,
        color=None if args.rand_augment == "none" else args.rand_augment,
        smoothing=args.smoothing,
        mixup=args.mixup,
        cutmix=args.cutmix,
        drop_path=args.drop_path,
    )


def _file_name(name: str, taken: list[str]) -> str:
    """The last part of a model's name as a folder's, unlike those that are taken."""
    plain = re.sub(r"[^\w.=-]+", "-", Path(name).name).strip("-.") or "model"
    return plain if plain not in taken else f"{plain}-{len(taken)}"
