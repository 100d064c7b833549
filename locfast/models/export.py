"""A backbone as plain timm weights: model.safetensors, config.json, and a README that says what they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from locfast.models.backbone import Backbone
from locfast.models.create import seeded
from locfast.models.model_card import write_model_card
from locfast.models.softcap import set_softcap

SAME = 5e-3
"""Relative L2 between the exported model's features and the backbone's; TF32 convolutions on a GPU need this much."""


def write_timm_export(
    backbone: Backbone, folder: Path, *, softcap: float | None, card: dict[str, Any], images: Tensor | None = None
) -> float | None:
    """Write `backbone` to `folder` so that plain timm loads it, and measure what the soft cap is worth.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the model, and so does its own architecture with
    `pretrained_cfg_overlay=dict(file="FOLDER/model.safetensors")`. Files of an earlier export there are replaced, each
    at once. card: facts for the README, see `describe_run`. images [B, 3, H, W], normalised: what to measure on; noise
    if not given. Returns how far features are off without the cap (relative L2), None where there is no cap.
    """
    plain = plain_timm_model(backbone)
    on_noise = images is None
    if images is None:
        images = torch.randn(4, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    images = images.float().cpu()
    with torch.no_grad():
        features = set_softcap(plain, softcap).forward_features(images)
        uncapped = set_softcap(plain, None).forward_features(images) if softcap is not None else features
    _check_same_features(backbone, softcap, images[:1], features[:1])
    without_cap = None if softcap is None else _relative(uncapped, features)
    folder = folder.resolve()  # "." has no name to write aside under
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_for_hf(plain, str(aside), model_args=_model_args(plain), safe_serialization=True)
        measured_on = f"{len(images)} images of {'Gaussian noise' if on_noise else 'the run'}"
        write_model_card(aside / "README.md", backbone, plain, softcap, without_cap, measured_on, card)
        folder.mkdir(exist_ok=True)
        for file in sorted(aside.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return without_cap


def plain_timm_model(backbone: Backbone) -> Any:
    """A timm model of the backbone's architecture, on the CPU, in eval mode, holding a copy of its weights.

    A backbone whose model pools by averaging (BEiT) may have been given a final norm for training. timm builds such a
    model with `global_pool=""`, and then without the norm behind the pooling, which says nothing about features.
    """
    model = backbone.model
    args = _model_args(model)
    state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    pools_behind_norm = not isinstance(getattr(model, "fc_norm", nn.Identity()), nn.Identity)
    if pools_behind_norm and backbone.has_final_norm:
        args["global_pool"] = ""
        state = {key: tensor for key, tensor in state.items() if not key.startswith("fc_norm.")}
    config = {key: value for key, value in model.pretrained_cfg.items() if value is not None}
    with seeded(0):
        plain: Any = timm.create_model(config["architecture"], pretrained_cfg=config, num_classes=0, **args)
    plain.load_state_dict(state, strict=True)
    if not hasattr(plain, "_model_args"):
        plain._model_args = args
    return plain.eval()


def _model_args(model: Any) -> dict[str, Any]:
    """What beside its name builds the model; no head, whatever it once had."""
    return {key: value for key, value in model._model_args.items() if key != "num_classes"}


@torch.no_grad()
def _check_same_features(backbone: Backbone, softcap: float | None, image: Tensor, features: Tensor) -> None:
    """Raise unless the backbone makes `features` [1, T, C] of `image` [1, 3, H, W]."""
    device, training = next(backbone.parameters()).device, backbone.training
    backbone.eval()
    with torch.autocast(device.type, enabled=False):
        ours = backbone(image.to(device), softcap=softcap).cpu()
    backbone.train(training)
    difference = _relative(features, ours)
    if not difference < SAME:
        raise RuntimeError(
            f"the exported {type(backbone.model).__name__} does not compute what {backbone.name} computes: relative L2 "
            f"{difference:.2e}; nothing was written"
        )


def _relative(approximate: Tensor, exact: Tensor) -> float:
    return ((approximate.float() - exact.float()).norm() / exact.float().norm()).item()
