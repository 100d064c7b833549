"""A linear classifier on frozen, standardised features.

lbfgs: logistic regression on the full batch, its L2 penalty swept. sgd: cross entropy by SGD, its learning rate swept,
all rates trained together, as in DINOv2. The best value is chosen on a held-out tenth of the training split, the whole
of which is then fitted again; validation images are only reported.
"""

from __future__ import annotations

import argparse

from locfast.eval.commands import shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_models(parser)
    shared.add_data(parser, train=True)
    parser.add_argument("--solver", choices=("lbfgs", "sgd"), default="lbfgs", help="(default %(default)s)")
    parser.add_argument("--l2", type=float, nargs="+", help="lbfgs: penalties to sweep; default: 1e-6 to 1 by tens")
    parser.add_argument("--max-iterations", type=int, default=1000, help="lbfgs: at most (default %(default)s)")
    parser.add_argument(
        "--lr", type=float, nargs="+", help="sgd: rates to sweep, for batches of 256; default: DINOv2's"
    )
    parser.add_argument("--epochs", type=int, default=10, help="sgd: passes over the features (default %(default)s)")
    parser.add_argument("--sgd-batch", type=int, default=1024, help="sgd: images in a batch (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    from locfast.errors import UserError
    from locfast.eval.commands.learned import read_splits
    from locfast.eval.global_ability.linear import L2, RATES, check_enough, fit
    from locfast.eval.global_ability.results import scores

    for name in ("l2", "lr", "max_iterations", "epochs", "sgd_batch"):
        value = getattr(args, name)
        if value is not None and min([value] if isinstance(value, int) else value) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}.")
    values = args.l2 or L2 if args.solver == "lbfgs" else args.lr or RATES
    splits = read_splits(args, check_enough)
    train, val, classes = splits.train, splits.val, splits.sources[1].classes
    predicted, details, notes = {}, {}, []
    for name, _ in splits.models:
        made = fit(
            *(train.features[name], train.labels, len(classes)),
            solver=args.solver,
            values=values,
            seed=args.seed,
            device=splits.reading.device,
            epochs=args.epochs,
            batch_size=args.sgd_batch,
            max_iterations=args.max_iterations,
        )
        predicted[name] = made.predict(val.features[name])
        what = "penalty" if args.solver == "lbfgs" else "learning rate"
        details[name] = {
            "chosen": made.chosen,
            "held_out": [{"value": value, "accuracy": share} for value, share in made.held_out.items()],
            "iterations": made.iterations,
            "converged": made.converged,
        }
        if made.at_edge:
            flag = "--l2" if args.solver == "lbfgs" else "--lr"
            notes.append(f"{name}: the best {what}, {made.chosen:g}, lies at the end of the sweep; {flag} widens it.")
        if not made.converged:
            notes.append(f"{name}: the fit had not converged after {made.iterations} iterations (--max-iterations).")
    against = splits.models.against
    found = scores(args.solver, predicted, val.labels, classes, against, seed=args.seed, details=details)
    splits.finish(args, "linear", found, notes, swept=list(values))
    return 0
