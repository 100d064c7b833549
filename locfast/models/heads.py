"""What a model's head is before the model is built: a projection into a joint space, a classifier, or nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

State = dict[str, Tensor]


def own_width(name: str) -> int | None:
    """Outputs of the projection that the model called `name` brings: 0 for none, None for what its config says."""
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return config.get("num_classes", config.get("pretrained_cfg", {}).get("num_classes")) or 0
        except (OSError, ValueError, AttributeError):  # no config of timm's: whoever loads it says so
            return 0
    if "@" in name and not name.startswith(("hf-hub:", "hf_hub:")):
        return file_width(name)
    return None if "_clip_" in name and "_ft_" not in name and not is_classifier(name) else 0


JOINT_SPACE = "joint_space"
"""The key of an export's config.json whose head projects into a space of images and texts; timm passes it over."""


def mark_joint_space(folder: Path, width: int) -> None:
    """Say in the config of a timm folder that its head of `width` outputs is a projection, and no classifier."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), JOINT_SPACE: width}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def has_joint_space(name: str) -> bool:
    """Whether `name` is an export that `mark_joint_space` marked."""
    try:
        config = json.loads(Path(name.removeprefix("local-dir:"), "config.json").expanduser().read_text("utf-8"))
        return bool(config.get(JOINT_SPACE))
    except (OSError, ValueError, AttributeError):
        return False


def is_classifier(name: str) -> bool:
    """Whether a CLIP of timm's registry was fine-tuned on classes; without a tag, by the weights that timm then takes.

    Such a model's head is no projection: vit_base_patch16_clip_224 alone means laion2b_ft_in12k_in1k, 1000 classes.
    """
    architecture, _, tag = name.removeprefix("hf-hub:timm/").removeprefix("hf_hub:timm/").partition(".")
    if "_clip_" not in architecture or "@" in name or not timm.is_model(architecture):
        return False
    config = timm.get_pretrained_cfg(architecture)
    return "_ft_" in (tag or str(config and config.tag))


def file_width(name: str) -> int:
    """Outputs of the head in the checkpoint of ARCHITECTURE@FILE; 0 where there is none, or no file to read."""
    architecture, _, file = name.partition("@")
    if not (timm.is_model(architecture) and Path(file).expanduser().is_file()):
        return 0  # whoever loads it says so
    with torch.device("meta"):
        model: Any = timm.create_model(architecture)
    try:
        state = as_timm_names(load_state_dict(str(Path(file).expanduser()), weights_only=True), model)
    except Exception:  # no checkpoint, or another architecture's: whoever loads it says so
        return 0
    weight = state.get("head.weight")
    return 0 if weight is None else len(weight)


def as_timm_names(state: State, model: nn.Module) -> State:
    """A checkpoint as timm's own converter for `model` names it, position embeddings resampled to its grid."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return state if convert is None else convert(state, model)
