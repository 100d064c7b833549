"""Zero-shot classification: images by the names of their classes, through CLIP's or SigLIP's text tower (open_clip).

An image takes the class whose prompts lie nearest in the joint space. The backbone's tokens go through the pooling and
projection of the open_clip model's own image tower, so that model must be the one that the backbone started from. A
run that trained a way into the joint space (uta, clip, cloc) takes that instead, and names its text tower itself.
"""

from __future__ import annotations

import argparse

from locfast.eval.commands import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_models(parser)
    shared.add_data(parser, train=False)
    group = shared.add_text(parser)
    group.add_argument(
        "--names", metavar="FILE", help="names of the classes; default: DIR/classes.json, classes.txt, ..."
    )
    group.add_argument("--templates", default="imagenet", help="imagenet (80 prompts), simple (7), or a file of lines")


def run(args: argparse.Namespace) -> int:
    import torch

    from locfast.data.sources import ClassFolder
    from locfast.eval.commands.joint import TextTowers, open_joint
    from locfast.eval.commands.models import Models
    from locfast.eval.global_ability.features import image_features
    from locfast.eval.global_ability.prompts import class_names, templates
    from locfast.eval.global_ability.results import check_out, scores

    shared.tell_progress()
    reading = shared.reading(args)
    val = ClassFolder(args.val)
    texts = TextTowers(args)
    names, prompts = class_names(val, args.names), templates(args.templates)
    check_out(args.out, args.overwrite)
    models = Models(args)
    joint = open_joint(texts, models, [*args.model, args.against], "zero-shot", reading.device)
    towers = {id(text): text for text in joint.texts.values()}
    classifiers = {key: text.classifier(names, prompts, reading.device) for key, text in towers.items()}
    read = image_features(val, joint.towers, reading)
    predicted = {}
    for name, embeddings in read.features.items():
        text = joint.texts[name]
        classifier = classifiers[id(text)]
        parts = [text.logits(some.to(reading.device), classifier).argmax(-1).cpu() for some in embeddings.split(65536)]
        predicted[name] = torch.cat(parts)
    found = scores("zero-shot", predicted, read.labels, val.classes, models.against, seed=args.seed)
    settings = {
        "device": str(reading.device),
        "precision": reading.precision,
        "names_of_classes": dict(zip(val.classes, names, strict=True)),
        "prompts": prompts,
        "text_towers": joint.described,
    }
    shared.finish(args, "zero-shot", found, models, {"val": (val, read)}, settings, joint.notes)
    return 0
