"""Weighted k-nearest-neighbour classification on frozen features, as in DINO.

A validation image takes the class that its k most similar training images vote for (cosine, weights exp(s / 0.07)).
Nothing is trained and nothing is chosen, so it says most directly whether images of one class lie together.
"""

from __future__ import annotations

import argparse

from locfast.eval.commands import shared

KS = (10, 20, 100, 200)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_models(parser)
    shared.add_data(parser, train=True)
    parser.add_argument(
        "--k", type=int, nargs="+", default=list(KS), help="numbers of neighbours (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    from locfast.errors import UserError
    from locfast.eval.commands.learned import read_splits
    from locfast.eval.global_ability.knn import check_ks, knn_predict
    from locfast.eval.global_ability.results import Score, scores

    if not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature}: type a positive one; DINO's is 0.07.")
    splits = read_splits(args, lambda train: check_ks(args.k, train))
    ks = sorted(set(args.k))
    train, val = splits.train, splits.val
    predicted = {
        name: knn_predict(
            *(train.features[name], train.labels, val.features[name], len(splits.sources[1].classes), ks),
            temperature=args.temperature,
            device=splits.reading.device,
        )
        for name, _ in splits.models
    }
    found: list[Score] = []
    for k in ks:
        of = {name: one[k] for name, one in predicted.items()}
        found += scores(f"k = {k}", of, val.labels, splits.sources[1].classes, splits.models.against, seed=args.seed)
    splits.finish(args, "knn", found, [])
    return 0
