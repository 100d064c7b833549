"""Small CLIP towers on disk, as users have them: a timm folder with its projection, open_clip configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

SIZE, JOINT = 64, 24
ARGS = {"img_size": SIZE, "embed_dim": 48, "depth": 2, "num_heads": 4}


def lively(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Weights far from their initial zeros and ones, so that nothing hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def timm_clip(folder: Path, architecture: str = "vit_base_patch16_clip_quickgelu_224", **more: Any) -> str:
    """A tower that timm saved, its head the projection to JOINT; gives its name for --model."""
    args = {**ARGS, **more}
    model: Any = lively(timm.create_model(architecture, num_classes=JOINT, **args))
    save_for_hf(model, str(folder), model_args=args, safe_serialization=True)
    return str(folder)


def open_clip_config(folder: Path, kind: str) -> str:
    """A config of open_clip, of its own ViT ("vit") or of timm's EVA-02 ("timm"); gives the file's path."""
    vision: dict[str, Any] = {"image_size": SIZE, "patch_size": 16, "width": 48, "layers": 2, "head_width": 12}
    if kind == "timm":
        vision = {
            "timm_model_name": "eva02_base_patch16_clip_224",
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": "linear",
            "image_size": SIZE,
        }
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    file = folder / f"small-{kind}.json"
    file.write_text(json.dumps({"embed_dim": JOINT, "vision_cfg": vision, "text_cfg": text}))
    return str(file)
