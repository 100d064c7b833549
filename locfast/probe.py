"""`python -m locfast.probe --model M_or_RUN --data D --out DIR`: how much do patch embeddings tell of what is there?

Small heads on a frozen backbone learn from a labelled dataset which classes are in every patch (local) and in the whole
image (global). With --compare it sets finished probes beside each other.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.cli import command
from locfast.errors import UserError

if TYPE_CHECKING:
    from locfast.eval.probing.results import ProbeResult

WRITTEN = ("probe.json", "compare.json", "report.html", "shares.npz", "counts", "heads", "pictures")
"""What a probe or a comparison leaves in --out, and all that --overwrite replaces there."""
DEMO = {"epochs": 20, "warmup": 100, "lr": 3e-3, "batch_size": 64}
"""For the embedded scenes, which are few and easy: the paper's 5 epochs are made for 118,000 photographs."""


@command
def main() -> None:
    args = _parser().parse_args()
    if args.out is None:
        raise UserError("--out DIR: say where results go, for example --out runs/probe-demo.")
    args.out = args.out.resolve()  # "." has no name to write aside under
    _check_out(args.out, args.overwrite)
    if args.compare:
        _compare(args)
    else:
        _probe(args)


def _check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where something is there that may not be replaced: --overwrite is for probes alone."""
    there = sorted(file.name for file in out.iterdir()) if out.is_dir() else [out.name] if out.exists() else []
    if there and not out.is_dir():
        raise UserError(f"--out {out}: a file is there, so nothing is written. Give a folder.")
    if there and not overwrite:
        raise UserError(
            f"--out {out}: something is there already ({there[0]}), and nothing is overwritten unasked. Add "
            "--overwrite, or give another --out."
        )
    probe = {"probe.json", "compare.json"} & set(there)
    if there and ("config.yaml" in there or not probe):
        what = "a run" if "config.yaml" in there else f"{there[0]}, and no probe,"
        raise UserError(f"--out {out} --overwrite: {what} is there, so nothing is deleted. Give another --out.")


def _compare(args: argparse.Namespace) -> None:
    from rich.console import Console

    from locfast.eval.probing.compare import compare, read_comparison
    from locfast.eval.probing.table import table
    from locfast.report import write_report

    folder = compare(args.compare, args.out, args.baseline).parent
    console = Console()
    console.print(table(read_comparison(folder)))
    console.print(str(write_report(folder)), soft_wrap=True)


def _probe(args: argparse.Namespace) -> None:
    from locfast.data.labelled import check_disjoint, open_labelled
    from locfast.engine.precision import pick_device, pick_precision
    from locfast.eval.probing.run import probe_backbone
    from locfast.eval.probing.settings import Settings
    from locfast.subject import open_subject

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one order of sums, asked for before CUDA starts
    usual = DEMO if args.data == "demo" else {}
    chosen: dict[str, Any] = {
        name: usual.get(name) if getattr(args, name) is None else getattr(args, name) for name in DEMO
    }
    given = {"epochs": "epochs", "warmup": "warmup_steps", "lr": "lr", "batch_size": "batch_size"}
    settings = Settings(
        heads=tuple(args.heads),
        tasks=tuple(args.tasks),
        interventions=tuple(args.interventions),
        labels=args.labels,
        protocol=args.protocol,
        held_out=args.held_out,
        seeds=tuple(args.seeds),
        weight_decay=args.weight_decay,
        control=args.control,
        **{field: chosen[name] for name, field in given.items() if chosen[name] is not None},
    )
    device = pick_device(args.device)
    splits = {
        side: open_labelled(args.data, side, seed=0, unlabeled=args.unlabeled) for side in ("train", "validation")
    }
    check_disjoint(splits["train"], splits["validation"])
    subject = open_subject(
        args.model, pretrained=args.pretrained, image_size=args.image_size, softcap=args.softcap, seed=args.model_seed
    )
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".partial-{args.out.name}-", dir=args.out.parent))
    except OSError as error:
        raise UserError(f"--out {args.out}: no folder can be made there ({error.strerror}); give another.") from None
    try:
        result = probe_backbone(
            subject.backbone,
            subject.softcap,
            args.name or subject.name,
            splits["train"],
            splits["validation"],
            settings,
            aside,
            device=device,
            precision=pick_precision(args.precision, device),
            model=args.model,
            machine=_machine(device),
            keep=args.features,
            cache_folder=args.cache,
            workers=args.workers,
            limit=args.limit,
            tell=lambda line: print(line, flush=True),
        )
        _check_out(args.out, args.overwrite)  # another probe may have been first
        _put(aside, args.out)  # with --overwrite too: only now is there something to put in an old probe's place
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _print(result, args.out)


def _put(aside: Path, out: Path) -> None:
    """Move a probe's files into `out` in place of those of an older one; whatever else lies there stays.

    `out` itself stays where it is there: it may be a mounted folder, or the one that a shell is in. probe.json goes
    first and comes last, so that a folder that holds it is whole.
    """
    out.mkdir(exist_ok=True)
    for name in WRITTEN:
        there = out / name
        shutil.rmtree(there) if there.is_dir() and not there.is_symlink() else there.unlink(missing_ok=True)
    for name in reversed(WRITTEN):
        if (aside / name).exists():
            shutil.move(aside / name, out / name)


def _print(result: ProbeResult, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from locfast.report import write_report

    table = Table(title=f"{result.model} on {result.data}, %", title_justify="left")
    for column in ("head", "seed", "recall", "AP", "F1", "precision", "epoch"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for one in result.heads:
        scores = [f"{100 * one.validation[name]:.2f}" for name in ("recall", "ap", "f1", "precision")]
        table.add_row(one.key.replace("/", ", "), str(one.seed), *scores, str(one.best_epoch))
    console = Console()
    console.print(table)
    chosen_on = {
        "held-out": f"Epochs were chosen by recall on {result.images['selection']} training images held out; "
        f"the {result.images['validation']} validation images were used once, for the figures above.",
        "paper": "The paper's protocol: epochs were chosen by recall on the validation images themselves, on which it "
        "is reported. Compare with the paper's figures alone.",
    }
    console.print(chosen_on[result.settings["protocol"]])
    console.print(f"{result.seconds['all']:.0f} s in all. {write_report(out)}", soft_wrap=True)


def _machine(device: Any) -> dict[str, str]:
    import timm
    import torch

    from locfast import __version__

    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"locfast": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return {"device": chip, **versions, "python": platform.python_version()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m locfast.probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("what is probed")
    model.add_argument("--model", default="demo", metavar="M_or_RUN", help="a run folder, an export, or a model's name")
    model.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="its trained weights")
    model.add_argument("--image-size", type=int, metavar="PX", help="where not the model's own")
    model.add_argument("--softcap", type=float, help="cap of the attention logits that an export was trained with")
    model.add_argument("--model-seed", type=int, default=0, help="of random weights, with --no-pretrained")
    model.add_argument("--name", help="what to call it in tables and reports")
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="demo", metavar="D", help="labelled images (docs/probe.md), or demo")
    data.add_argument("--unlabeled", type=_unlabeled, default="auto", metavar="ID", help="class id, none, or auto")
    data.add_argument("--limit", type=_positive, metavar="N", help="the first N images of each split")
    data.add_argument("--labels", choices=("union", "majority"), default="union", help="classes of a patch")
    heads = parser.add_argument_group("heads")
    heads.add_argument("--heads", nargs="+", default=["transformer", "mlp", "linear"], metavar="HEAD")
    heads.add_argument("--tasks", nargs="+", default=["local", "global"], metavar="TASK")
    heads.add_argument("--interventions", nargs="+", default=["none"], metavar="I", help="none, prefix, anonymous")
    heads.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    heads.add_argument("--epochs", type=int, help="default 5; 20 of the embedded scenes")
    heads.add_argument("--batch-size", type=int, help="default 32")
    heads.add_argument("--lr", type=float, help="peak rate, default 1e-3; a cosine takes it to a tenth")
    heads.add_argument("--warmup", type=int, metavar="STEPS", help="default 500, and at most a tenth of all steps")
    heads.add_argument("--weight-decay", type=float, default=0.01)
    heads.add_argument(
        "--protocol",
        choices=("held-out", "paper"),
        default="held-out",
        help="which images choose the epoch: training images held out, or the validation images, as in the paper",
    )
    heads.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="of the training images")
    heads.add_argument(
        "--control",
        choices=("none", "position", "shuffled"),
        default="none",
        help="what a probe finds in tokens that are alike for all images, or with the labels of other images",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--features", choices=("auto", "memory", "cache", "live"), default="auto", help="see docs/probe.md"
    )
    how.add_argument("--cache", type=Path, metavar="DIR", help="keep features there, for later probes")
    how.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    how.add_argument("--device", default="auto")
    how.add_argument("--workers", type=int)
    how.add_argument("--out", type=Path, metavar="DIR")
    how.add_argument("--overwrite", action="store_true", help="replace the probe that --out holds")
    beside = parser.add_argument_group("finished probes")
    beside.add_argument("--compare", nargs="+", type=Path, metavar="DIR", help="set these beside each other in --out")
    beside.add_argument(
        "--baseline", metavar="DIR", help="of --compare: what the others are held to (default: the first)"
    )
    return parser


def _unlabeled(word: str) -> int | str | None:
    if word in ("auto", "none"):
        return None if word == "none" else word
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r}: a class id, none or auto")
    return int(word)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of images; write 1 or more")
    return int(word)


if __name__ == "__main__":
    main()
