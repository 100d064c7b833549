"""Train the embedded demo's backbone: a small ViT that only ever hears *which* classes are in a scene, never where.

`python -m locfast.demo.pretrain --out locfast/demo/teacher` made the weights that locfast ships. Supervision is
image-level and multi-label (binary cross-entropy on the CLS token), the way classifiers and CLIP are trained, with a
curriculum from one object a scene to four. Every scene is new: no image is seen twice. A second stage (`--start`,
`--hide`) goes on with random patches hidden, under the labels of the whole scene, so that the model's answer to a
masked image means something: locality alignment asks for that of its teacher (section 3.3). The result is a folder
that plain timm loads: `timm.create_model("local-dir:locfast/demo/teacher", pretrained=True)`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from locfast.data.scenes import CLASSES, MAX_OBJECTS, SIZE, present_classes, render_scenes, scene_keys
from locfast.random import uniform

MEAN, STD, PATCH = 0.3, 0.3, 8
TRAIN_STREAM, HELD_OUT_STREAM = 1000, 1001
"""Seeds of the scene streams that this script trains on and judges by; nothing else in locfast draws from them."""
HELD_OUT = 2048


def model_config(width: int, depth: int) -> dict[str, Any]:
    """timm's own description of the model, as in a Hugging Face hub `config.json`."""
    classes = len(CLASSES) - 1
    return {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": classes,
        "num_features": width,
        "label_names": list(CLASSES[1:]),
        "model_args": {
            "img_size": SIZE,
            "patch_size": PATCH,
            "embed_dim": width,
            "depth": depth,
            "num_heads": width // 32,
            "class_token": True,
            "global_pool": "token",
        },
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        },
    }


def batch_of(stream: int, start: int, count: int, max_objects: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normalised images [count, 3, SIZE, SIZE] and which classes they show, [count, K] fp32."""
    images, labels = render_scenes(scene_keys(stream, start, count, device), max_objects)
    return (images.float() / 255 - MEAN) / STD, present_classes(labels).float()


@torch.no_grad()
def evaluate(model: nn.Module, device: torch.device, scenes: int = HELD_OUT) -> dict[str, float]:
    """Macro recall and precision (at sigmoid > 0.5, mean over classes) on held-out scenes of one to four objects."""
    model.eval()
    hits, found, there = (torch.zeros(len(CLASSES) - 1, device=device) for _ in range(3))
    for start in range(0, scenes, 256):
        images, truth = batch_of(HELD_OUT_STREAM, start, min(256, scenes - start), MAX_OBJECTS, device)
        guess = (model(images) > 0).float()
        hits, found, there = hits + (guess * truth).sum(0), found + guess.sum(0), there + truth.sum(0)
    model.train()
    return {
        "recall": (hits / there.clamp(min=1)).mean().item(),
        "precision": (hits / found.clamp(min=1)).mean().item(),
    }


def hide_patches(images: Tensor, start: int, most: float) -> Tensor:
    """Set a share of the patches, uniform on 0 .. `most` for every image, to the mean colour: [B, 3, SIZE, SIZE]."""
    batch, cells = len(images), SIZE // PATCH
    keys = scene_keys(TRAIN_STREAM, start, batch, images.device)
    share = uniform(keys, "pretrain.share", 1) * most
    kept = uniform(keys, "pretrain.hide", cells * cells) >= share
    pixels = kept.view(batch, 1, cells, cells).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return images * pixels


def objects_at(fraction: float) -> int:
    """The curriculum: at most how many objects a scene has after this fraction of training."""
    return 1 + sum(fraction >= edge for edge in (0.04, 0.10, 0.20))


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine to a hundredth of `peak`."""
    wave = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * wave)


def save_teacher(model: nn.Module, folder: Path, config: dict[str, Any], training: dict[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`, each beside its place and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, folder / "weights.part")
    os.replace(folder / "weights.part", folder / "model.safetensors")
    (folder / "config.part").write_text(json.dumps({**config, "training": training}, indent=2) + "\n")
    os.replace(folder / "config.part", folder / "config.json")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m locfast.demo.pretrain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start", type=Path, help="go on from this teacher: its weights, four objects a scene")
    parser.add_argument("--hide", type=float, default=0.0, help="hide up to this share of the patches of every image")
    parser.add_argument("--save-every", type=int, default=250, help="steps; a killed run goes on from the last one")
    asked = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(asked)

    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    config = model_config(args.width, args.depth)
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    first, stages = 0, []
    if args.start is not None:
        model.load_state_dict(load_file(args.start / "model.safetensors"))
        earlier = json.loads((args.start / "config.json").read_text())["training"]
        first, stages = earlier["images"], earlier["commands"]
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file, step, seconds = args.out / "state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]

    started, total = time.monotonic() - seconds, 0.0
    while step < args.steps:
        objects = objects_at(step / args.steps) if args.start is None else MAX_OBJECTS
        position = first + step * args.batch_size
        images, truth = batch_of(TRAIN_STREAM, position, args.batch_size, objects, device)
        images = hide_patches(images, position, args.hide) if args.hide else images
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, args.steps, args.lr)
        loss = nn.functional.binary_cross_entropy_with_logits(model(images), truth)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach().item()
        step += 1
        if step % args.save_every and step != args.steps:
            continue
        measured = evaluate(model, device)
        seconds = time.monotonic() - started
        print(
            f"step {step} of {args.steps}  objects 1-{objects}  loss {total / ((step - 1) % args.save_every + 1):.4f}  "
            f"recall {measured['recall']:.3f}  precision {measured['precision']:.3f}  {seconds:.0f} s",
            flush=True,
        )
        total = 0.0
        training = {
            "commands": [*stages, "python -m locfast.demo.pretrain " + " ".join(asked)],
            "seed": args.seed,
            "steps": step,
            "images": first + step * args.batch_size,
            "supervision": "which classes are in the image (multi-label, binary cross-entropy on the CLS token)",
            "held_out": {"scenes": HELD_OUT, **{name: round(value, 4) for name, value in measured.items()}},
            "device": str(device),
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        save_teacher(model, args.out, config, training)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        torch.save(state, args.out / "state.part")
        os.replace(args.out / "state.part", state_file)
    state_file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
