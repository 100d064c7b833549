"""`python -m locfast.export RUN --to timm|hf|open_clip|prismatic|llava`: the trained backbone of a run as files that
another library's own loader takes; for a vision-language model, with its adapter; of a CLOC run, with its prompter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.cli import command
from locfast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = ("timm", "hf", "open_clip", "prismatic", "llava")
WITH_ADAPTER = ("prismatic", "llava")
ADAPTERS = ("maskembed", "truncated", "mlp")
LLM_WIDTH = 4096
"""Of a language model with 7 billion parameters: Llama 2, Vicuna, Mistral."""
LARGEST_WIDTH = 65536


@command
def main() -> None:
    args = _parser().parse_args()
    if not args.run.is_dir():
        raise UserError(
            f"RUN {args.run}: there is no such folder. Give the --out of a `python -m locfast.train` run, by default "
            "runs/METHOD-MODEL."
        )
    _check_adapter(args)
    out = args.out or args.run / ("exported" if args.to == "timm" else f"exported-{args.to}")
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {out}: {path} is a file, and an export is a folder. Give another --out.")
    if not args.overwrite and out.exists() and any(out.iterdir()):
        raise UserError(
            f"--out {out}: something is there already, and nothing is overwritten unasked. Add --overwrite, or give "
            "another --out."
        )
    export(args.run, out, args.ema, args.to, args.adapter, args.llm_width or LLM_WIDTH)


def _check_adapter(args: argparse.Namespace) -> None:
    for flag, value in (("--adapter", args.adapter), ("--llm-width", args.llm_width)):
        if value is not None and args.to not in WITH_ADAPTER:
            raise UserError(
                f"{flag} {value}: an export to {args.to} has no adapter. Leave the flag out, or type --to prismatic or "
                "--to llava."
            )
    if args.llm_width is not None and not 1 <= args.llm_width <= LARGEST_WIDTH:
        raise UserError(
            f"--llm-width {args.llm_width}: this is the width of the language model's embeddings, from 1 to "
            f"{LARGEST_WIDTH}. Type {LLM_WIDTH} for one with 7 billion parameters, 5120 for 13."
        )


def export(
    run: Path, out: Path, ema: bool | None, to: str = "timm", adapter: Any = None, llm_width: int = LLM_WIDTH
) -> None:
    """Write the backbone of the newest complete checkpoint of `run` to `out`, and say what was written.

    to, adapter, llm_width: as the command's flags. Raises UserError where the run has no checkpoint, no backbone or no
    decoder, and where the target cannot hold the architecture.
    """
    from locfast.config.files import read_yaml
    from locfast.config.registry import method_config
    from locfast.engine import checkpoint
    from locfast.engine.run_folder import RunFolder, load_method
    from locfast.models.exporters.folder import written_aside
    from locfast.models.model_card import describe_run
    from locfast.models.prompter_file import FILES as PROMPTER_FILES

    folder = RunFolder(run)
    method = load_method(run, ema)
    found, _ = checkpoint.newest(folder.checkpoints)
    if found is None:
        raise UserError(f"{run} has no complete checkpoint. Train longer, or go on with --resume.")
    artifacts = method.artifacts()
    averaged = ema is not False and bool(found.tensors("ema"))
    softcap, backbone = artifacts.get("softcap"), artifacts["backbone"]
    images, config = None, folder.read_config()
    if softcap is not None or to != "timm":  # something is measured on them
        images = _some_images(config, method, backbone.image_size)
    from_scratch = method_config(config).from_scratch or not config.pretrained
    given: dict[str, Any] = {
        "softcap": softcap,
        "card": describe_run(read_yaml(folder.config), folder.read_metrics(), found.step, averaged, from_scratch),
        "images": images,
    }
    if artifacts.get("embed") is not None:
        given["card"]["joint"] = "text" if "text_tower" in artifacts else "teacher"
    with written_aside(out) as aside:
        beside = _write_prompter(to, artifacts, aside, out, adapter, method, given["card"])
        lines = _write(to, artifacts, aside, out, adapter, llm_width, given, _view(method).crop == "pad")
        lines += beside
    if "prompter" not in given["card"]:
        for name in PROMPTER_FILES:  # of an earlier export, whose tower is no longer there
            (out / name).unlink(missing_ok=True)
    print(f"{out}: step {found.step}{' (moving average)' if averaged else ''}")
    print("\n".join(lines))


def _write_prompter(
    to: str, artifacts: dict[str, Any], folder: Path, out: Path, adapter: Any, method: Any, card: dict[str, Any]
) -> list[str]:
    """Write the prompter that a run trained to `folder`, where it trained one and the target hands on what it reads.

    Returns what its user types next, or why there is none.
    """
    if artifacts.get("prompter") is None:
        return []
    if to in WITH_ADAPTER and adapter == "truncated":
        return ["no prompter: it reads the last block's tokens, and --adapter truncated takes the last blocks away"]
    from locfast.models.prompter_file import Frame, save_prompter

    view = _view(method)
    frame = Frame(view.size, view.mean, view.std, view.interpolation, view.crop == "pad")
    card["prompter"] = save_prompter(
        folder,
        artifacts["prompter"],
        artifacts.get("box_head"),
        backbone=artifacts["backbone"],
        frame=frame,
        region_scale=artifacts["region_scale"],
    )
    return [f'PYTHONPATH={out}: from cloc_prompter import load; prompter = load("{out}")']


def _write(
    to: str,
    artifacts: dict[str, Any],
    folder: Path,
    out: Path,
    adapter: Any,
    llm_width: int,
    given: dict[str, Any],
    padded: bool,
) -> list[str]:
    """Write one format to `folder`, which will be `out`; returns what its user types next."""
    backbone, softcap = artifacts["backbone"], given["softcap"]
    if to == "timm":
        from locfast.models.export import write_timm_export

        off = write_timm_export(backbone, folder, **given)
        load = [f'timm.create_model("local-dir:{out}", pretrained=True)']
        if off is not None:
            load.append(
                f"trained with soft cap {softcap:g}: from locfast.models.softcap import set_softcap; "
                f"model = set_softcap(model, {softcap}); features without it differ by {off:.1e} (relative L2)"
            )
        return load
    path = f"PYTHONPATH={out}"
    if to == "open_clip":
        from locfast.models.exporters.open_clip import no_pair, write_open_clip_export

        text = _text_half(artifacts, padded)
        write_open_clip_export(backbone, folder, text=text, **given)
        tower = f'{path}: from open_clip_tower import load_model; model = load_model("{out}")'
        if text is None:
            return [tower]
        missing = no_pair(backbone, text)
        both = f'both towers: open_clip.create_model_and_transforms("local-dir:{out}")'
        return [tower, both if missing is None else f"the image tower alone: {missing}"]
    if to == "hf":
        from locfast.models.exporters.hf import write_hf_export

        differences = write_hf_export(backbone, folder, **given)
        return [
            f'{path}: from aligned_tower import load_tower, tower_features; tower = load_tower("{out}")',
            f"tokens without the final norm differ by {differences.without_norm:.1e} (relative L2)",
        ]
    from locfast.models.exporters.adapter import make_adapter

    made = make_adapter(adapter, artifacts, softcap, llm_width, to)
    projector = f'from maskembed_adapter import load_adapter; adapter = load_adapter("{out}")  # {made.kind}'
    if to == "llava":
        from locfast.models.exporters.hf import write_llava_export

        write_llava_export(backbone, folder, adapter=made, **given)
        return [f'{path}: from aligned_tower import AlignedTower; tower = AlignedTower("{out}")', projector]
    from locfast.models.exporters.prismatic import write_prismatic_export

    write_prismatic_export(backbone, folder, adapter=made, **given)
    return [f'{path}: from aligned_vit import AlignedViT; AlignedViT("aligned", folder="{out}")', projector]


def _text_half(artifacts: dict[str, Any], padded: bool) -> Any:
    """The text tower that a run trained with its image tower; None where it trained none."""
    if "text_tower" not in artifacts:
        return None
    from locfast.models.exporters.open_clip_pair import TextHalf

    return TextHalf(artifacts["text"]["model"], artifacts["text_tower"], padded)


def _view(method: Any) -> Any:
    """The view of an image that a run is judged on."""
    return next(iter(method.validation_spec().views.values()))


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
    parser.add_argument("--to", choices=TARGETS, default="timm", help="whose loader is to take it (default: timm)")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/exported, or RUN/exported-TO)")
    parser.add_argument(
        "--adapter",
        choices=ADAPTERS,
        help="prismatic, llava: MaskEmbed's decoder (default), the backbone's last two blocks, or a new MLP",
    )
    parser.add_argument(
        "--llm-width", type=int, help=f"prismatic, llava: the language model's width (default {LLM_WIDTH})"
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average of the weights, or the weights themselves (default: the average where there is one)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


if __name__ == "__main__":
    main()
