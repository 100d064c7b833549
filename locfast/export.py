"""`python -m locfast.export RUN --to timm`: the trained backbone of a run as files that plain timm loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.cli import command
from locfast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@command
def main() -> None:
    args = _parser().parse_args()
    if not args.run.is_dir():
        raise UserError(
            f"RUN {args.run}: there is no such folder. Give the --out of a `python -m locfast.train` run, by default "
            "runs/METHOD-MODEL."
        )
    out = args.out or args.run / "exported"
    if not args.overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out}: something is there already, and nothing is overwritten unasked. Add --overwrite, or give "
            "another --out."
        )
    export_timm(args.run, out, args.ema)


def export_timm(run: Path, out: Path, ema: bool | None) -> None:
    """Write the backbone of the newest complete checkpoint of `run` to `out`, and say what was written."""
    from locfast.config.files import read_yaml
    from locfast.engine import checkpoint
    from locfast.engine.run_folder import RunFolder, load_method
    from locfast.models.export import write_timm_export
    from locfast.models.model_card import describe_run

    folder = RunFolder(run)
    method = load_method(run, ema)
    found, _ = checkpoint.newest(folder.checkpoints)
    if found is None:
        raise UserError(f"{run} has no complete checkpoint. Train longer, or go on with --resume.")
    artifacts = method.artifacts()
    averaged = ema is not False and bool(found.tensors("ema"))
    card = describe_run(read_yaml(folder.config), folder.read_metrics(), found.step, averaged)
    softcap, backbone = artifacts.get("softcap"), artifacts["backbone"]
    images = None if softcap is None else _some_images(folder.read_config(), method, backbone.image_size)
    without_cap = write_timm_export(backbone, out, softcap=softcap, card=card, images=images)
    print(f"{out}: step {found.step}{' (moving average)' if averaged else ''}")
    print(f'timm.create_model("local-dir:{out}", pretrained=True)')
    if without_cap is not None:
        print(
            f"trained with soft cap {softcap:g}: from locfast.models.softcap import set_softcap; "
            f"model = set_softcap(model, {softcap}); features without it differ by {without_cap:.1e} (relative L2)"
        )


def _some_images(config: Any, method: Any, size: tuple[int, int]) -> Tensor | None:
    """The first images of the run's data [<= 8, 3, H, W] as the method's validation sees them; None if out of reach."""
    import torch

    from locfast.data.loader import Loader
    from locfast.data.sources import open_source
    from locfast.methods.base import VALIDATION_EPOCH

    try:
        source = open_source(config.data, seed=config.seed)
        loader = Loader(source, method.validation_spec(), seed=config.seed, workers=0)
        batch = next(iter(loader.sequential(VALIDATION_EPOCH, [torch.arange(min(8, len(source)))])))
    except (UserError, OSError):
        return None  # the data may lie on the machine that trained
    return next((view for view in batch["views"].values() if tuple(view.shape[-2:]) == size), None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m locfast.export", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", choices=("timm",), default="timm", help="format: timm's safetensors and config.json")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/exported)")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average of the weights, or the weights themselves (default: the average where there is one)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


if __name__ == "__main__":
    main()
