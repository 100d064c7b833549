"""How far off are a tower's patch tokens without its soft cap, without its final norm, or one block earlier?

A VLM's loader may take any of these from an aligned CLIP or SigLIP. ViT-B/16 at 224 px on noise images, **with random
weights**, so the figures show that features differ and not by how much a trained model's do: the card of every export
says that, measured on the run's own images. Needs transformers. No time is taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from _results import RESULTS, commit

from locfast.models.backbone import load_backbone
from locfast.models.exporters.hf import write_hf_export
from locfast.models.student import make_student

MODELS = ("vit_base_patch16_clip_quickgelu_224.openai", "vit_base_patch16_siglip_224.webli")
SOFTCAP, STIR, BATCH = 30.0, 0.05, 8
"""STIR: deviation of what is added to every weight; timm's own 0.02 leaves logits so small that no cap could matter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "tower_features")
    parser.add_argument("--depth", type=int, default=12)
    args = parser.parse_args()
    rows = {name: measure(name, args.depth) for name in MODELS}
    head, dirty = commit()
    values: dict[str, Any] = {
        "commit": head,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {module.__name__: module.__version__ for module in (torch, timm, transformers)},
        "command": "python benchmarks/tower_features.py",
        "weights": f"random, seed 0, stirred by {STIR}",
        "softcap": SOFTCAP,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    aside = args.out / ".random.json"
    aside.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(aside, args.out / "random.json")
    print(f"written to {args.out / 'random.json'}")


def measure(name: str, depth: int) -> dict[str, Any]:
    """The export's own measurement, and how far the attention logits of the last block reach."""
    backbone = load_backbone(name, pretrained=False, depth=depth)
    student = make_student(backbone, new_norm=True, new_last_block=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(STIR * torch.randn(parameter.shape, generator=generator))
    images = torch.randn(BATCH, 3, *student.image_size, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        differences = write_hf_export(student, Path(folder, "out"), softcap=SOFTCAP, card={}, images=images)
    shape = {"B": BATCH, "T": student.num_tokens, "C": student.embed_dim, "blocks": student.depth}
    figures = {"shape": shape, "largest_logit": largest_logit(student, images), **dataclasses.asdict(differences)}
    print(name, figures)
    return figures


@torch.no_grad()
def largest_logit(student: Any, images: torch.Tensor) -> float:
    """Before the cap, in the last block, whose input was made under it."""
    x = student.add_prefix_and_position(student.embed_patches(images))
    x = student.run_blocks(x, stop=student.depth - 1, softcap=SOFTCAP)
    block = student.blocks[-1]
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, student.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) * block.attn.scale).abs().max().item()


if __name__ == "__main__":
    main()
