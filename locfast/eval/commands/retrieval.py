"""Image-text retrieval: recall at 1, 5 and 10 from images to their captions, and from captions to their images.

From an image any of its captions is right; every caption is a query of its own. Captions go through the text tower of
an open_clip model, images as in zero-shot: through the pooling and projection of that model's image tower, or through
what a run trained to reach its joint space.
"""

from __future__ import annotations

import argparse

from locfast.eval.commands import shared

SOURCES = "images with captions: pairs.jsonl, or a folder or tar shards with KEY.txt beside KEY.jpg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_models(parser)
    shared.add_data(parser, train=False, val=SOURCES)
    group = shared.add_text(parser)
    group.add_argument("--captions", type=int, metavar="N", help="the first N of every image (COCO: 5); default: all")
    group.add_argument("--template", default="{}", help="a sentence with {} for the caption (default: it alone)")


def run(args: argparse.Namespace) -> int:
    import torch

    from locfast.data.sources import open_source
    from locfast.errors import UserError
    from locfast.eval.commands.joint import TextTowers, open_joint
    from locfast.eval.commands.models import Models
    from locfast.eval.global_ability.features import read_features
    from locfast.eval.global_ability.results import check_out
    from locfast.eval.global_ability.retrieval import retrieval_scores

    if args.captions is not None and args.captions < 1:
        raise UserError(f"--captions {args.captions}: type at least 1.")
    if args.template.count("{}") != 1:
        raise UserError(f"--template {args.template!r}: it needs one {{}} where the caption goes: a photo of {{}}.")
    shared.tell_progress()
    reading = shared.reading(args)
    val = open_source(args.val)
    texts = TextTowers(args)
    check_out(args.out, args.overwrite)
    models = Models(args)
    joint = open_joint(texts, models, [*args.model, args.against], "retrieval", reading.device)
    read = read_features(val, joint.towers, reading, texts=True)
    captions = [own[: args.captions] for own in read.texts]
    image_of = torch.repeat_interleave(torch.tensor([len(own) for own in captions]))
    sentences = [args.template.replace("{}", caption) for own in captions for caption in own]
    towers = {id(text): text for text in joint.texts.values()}
    encoded = {key: text.encode(sentences, reading.device) for key, text in towers.items()}
    of = {name: encoded[id(text)] for name, text in joint.texts.items()}
    found = retrieval_scores(read.features, of, image_of, models.against, seed=args.seed, device=reading.device)
    settings = {
        "device": str(reading.device),
        "precision": reading.precision,
        "queries": {"images": len(read), "captions": len(sentences)},
        "text_towers": joint.described,
    }
    notes = [f"{len(read)} images and {len(sentences)} captions; a tie counts against the model", *joint.notes]
    shared.finish(args, "retrieval", found, models, {"val": (val, read)}, settings, notes, "recall")
    return 0
