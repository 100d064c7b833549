"""Zero-shot classification: images by the names of their classes, through CLIP's or SigLIP's text tower (open_clip).

An image takes the class whose prompts lie nearest in the joint space. The backbone's tokens go through the pooling and
projection of the open_clip model's own image tower, so that model must be the one that the backbone started from.
"""

from __future__ import annotations

import argparse

from locfast.eval.commands import shared

EXPECTED = (
    "Expected: alignment does not train the path from the CLS token to the text space, so an aligned backbone loses "
    "zero-shot; whether its global ability is kept, kNN and linear say."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_models(parser)
    shared.add_data(parser, train=False)
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text-model", required=True, metavar="NAME", help="of open_clip: ViT-B-16, or a config (.json)"
    )
    group.add_argument("--text-pretrained", required=True, metavar="TAG", help="openai, a checkpoint file, or none")
    group.add_argument(
        "--names", metavar="FILE", help="names of the classes; default: DIR/classes.json, classes.txt, ..."
    )
    group.add_argument("--templates", default="imagenet", help="imagenet (80 prompts), simple (7), or a file of lines")


def run(args: argparse.Namespace) -> int:
    import torch

    from locfast.data.sources import ClassFolder
    from locfast.eval.commands.models import Models
    from locfast.eval.global_ability.features import Tower, image_features
    from locfast.eval.global_ability.prompts import class_names, templates
    from locfast.eval.global_ability.results import check_out, scores
    from locfast.eval.global_ability.text_tower import open_text_tower, projection, same_origin

    shared.tell_progress()
    reading = shared.reading(args)
    val = ClassFolder(args.val)
    text = open_text_tower(args.text_model, args.text_pretrained, seed=args.seed)
    names, prompts = class_names(val, args.names), templates(args.templates)
    check_out(args.out, args.overwrite)
    models = Models(args)
    towers = {n: Tower(s.backbone, s.softcap, projection(text, s.backbone, n)) for n, s in models}
    notes = [EXPECTED] if models.aligned or models.against else []
    for name, subject in models:
        if name not in models.aligned and name not in models.against and not same_origin(text, subject.backbone):
            notes.append(
                f"{name} is not the image tower of {text.name} ({args.text_pretrained}): their patch embeddings "
                "differ, so these figures say nothing unless it was trained further."
            )
    classifier = text.classifier(names, prompts, reading.device)
    read = image_features(val, towers, reading)
    predicted = {}
    for name, embeddings in read.features.items():
        parts = [text.logits(some.to(reading.device), classifier).argmax(-1).cpu() for some in embeddings.split(65536)]
        predicted[name] = torch.cat(parts)
    found = scores("zero-shot", predicted, read.labels, val.classes, models.against, seed=args.seed)
    settings = {
        "device": str(reading.device),
        "precision": reading.precision,
        "names_of_classes": dict(zip(val.classes, names, strict=True)),
        "prompts": prompts,
    }
    shared.finish(args, "zero-shot", found, models, {"val": (val, read)}, settings, notes)
    return 0
