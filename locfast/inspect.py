"""`python -m locfast.inspect`: what compilers make of locfast's GPU kernels. With MODEL: the shapes of a backbone.

Without MODEL it compiles every Triton kernel and reads the CUDA ones, and lists registers, spills, shared memory,
occupancy and tensor-core instructions. No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from locfast.cli import command
from locfast.errors import UserError


@command
def main() -> None:
    args = _parser().parse_args()
    kernel_options = ("arch", "only", "json", "jobs", "check")
    given = [f"--{name}" for name in kernel_options if getattr(args, name) not in (None, False)]
    if args.model is None:
        if args.image_size is not None or args.pretrained:
            raise UserError("--image-size and --pretrained say something about a backbone: name it, as MODEL.")
        _kernels(args)
    elif given:
        raise UserError(
            f"{' '.join(given)}: for the listing of kernels, which takes no MODEL; found MODEL {args.model!r}. "
            f"Type python -m locfast.inspect {args.model} for the backbone, or leave it out for the kernels."
        )
    else:
        _backbone(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m locfast.inspect", description=__doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a timm name, hf-hub:org/name, a local timm folder, ARCHITECTURE@FILE, or demo; none to list kernels",
    )
    backbone = parser.add_argument_group("backbone")
    backbone.add_argument("--image-size", type=int, help="pixels of a side, where not the model's own")
    backbone.add_argument(
        "--pretrained", action="store_true", help="load the weights too, to see whether they can be had"
    )
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument(
        "--arch", type=_architecture, nargs="+", metavar="N", help="compute capabilities (default: 80 90 100)"
    )
    kernels.add_argument("--only", metavar="PART", help="kernels with this in their name")
    kernels.add_argument("--json", type=Path, metavar="FILE", help="write everything known, instruction counts too")
    kernels.add_argument("--jobs", type=_positive, metavar="N", help="processes that compile (default: one a core)")
    kernels.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 where a default bf16 or fp16 form of an attention or contrastive kernel at D <= 128 spills "
        "on sm_90 or runs a product without tensor cores",
    )
    return parser


def _architecture(word: str) -> int:
    digits = word.lower().removeprefix("sm_").rstrip("af")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is no compute capability; write 90 or sm_90")
    return int(digits)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of processes; write 1 or more")
    return int(word)


def _kernels(args: argparse.Namespace) -> None:
    from locfast.machine_code.check import ARCH, is_checked, offences
    from locfast.machine_code.listing import ARCHITECTURES, list_kernels
    from locfast.machine_code.table import table, write_json

    architectures = sorted(set(args.arch or ARCHITECTURES))
    if args.check and ARCH not in architectures:
        raise UserError(f"--check looks at sm_{ARCH}, and --arch leaves it out. Add {ARCH} to --arch, or drop --arch.")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json {args.json}: not a file in a folder that exists. Make the folder, or name another.")
    library = _library()
    listing = list_kernels(architectures, args.only or "", args.jobs or _cores(), library=library, progress=_progress)
    if library is None:
        listing.notes.append("locfast/_C.so was not built: there are no CUDA kernels to list")
    unknown = sum(not row.known for row in listing.rows)  # a row for every architecture that Triton does not know
    if args.only and len(listing.rows) == unknown < len(architectures):
        raise UserError(f"--only {args.only}: no kernel has that in its name. Leave it out to see them all.")
    if args.json:
        write_json(listing, args.json)
    print(table(listing.rows))
    for note in listing.notes:
        print(f"note: {note}")
    failed = [row for row in listing.rows if row.failed is not None and row.known]
    if failed:
        print(f"locfast: {len(failed)} of {len(listing.rows)} rows did not compile", file=sys.stderr)
    wrong = []
    if args.check:
        checked = [row for row in listing.rows if is_checked(row)]
        if not checked:
            raise UserError("--check: none of the kernels listed is held to anything. Drop --only, or drop --check.")
        wrong = offences(checked)
        for offence in wrong:
            print(f"locfast: {offence}", file=sys.stderr)
        if not wrong:
            print(f"check: {len(checked)} forms on sm_{ARCH} spill nothing and run their products on tensor cores")
    if failed or wrong:
        sys.exit(1)


def _library() -> Path | None:
    from locfast.kernels._backend import package_file

    return package_file("_C.so")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(
            f"\rcompiled {done} of {total}" + ("\r\x1b[K" if done == total else ""), end="", file=sys.stderr, flush=True
        )


def _backbone(args: argparse.Namespace) -> None:
    from locfast.models.backbone import load_backbone

    backbone = load_backbone(args.model, args.pretrained, image_size=args.image_size)
    prefix, patches = backbone.num_prefix_tokens, backbone.num_patches
    parameters = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    facts = {
        "model": f"{backbone.name} ({type(backbone.model).__name__})",
        "images": f"{backbone.image_size[0]} x {backbone.image_size[1]} px, mean {backbone.mean}, std {backbone.std}",
        "resize": f"crop_pct {backbone.crop_pct}, {backbone.interpolation}",
        "patches": f"{backbone.grid[0]} x {backbone.grid[1]} of {backbone.patch_size[0]} px",
        "tokens": f"{prefix} prefix + {patches} patches = {backbone.num_tokens}",
        "blocks": f"{backbone.depth} of width {backbone.embed_dim}, {backbone.num_heads} heads, {backbone.mlp_kind}",
        "final norm": f"eps {backbone.norm_eps}" if backbone.has_final_norm else "none",
        "parameters": f"{parameters / 1e6:.1f} M behind patch features",
        "soft cap": "yes" if backbone.supports_softcap else "no, its blocks run only as timm wrote them",
        "licence": backbone.model.pretrained_cfg.get("license") or "not known to timm",
    }
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
