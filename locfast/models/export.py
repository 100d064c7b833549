"""A backbone as plain timm weights: model.safetensors, config.json, and a README that says what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from locfast.models.backbone import Backbone
from locfast.models.create import seeded
from locfast.models.exporters.folder import Features, check_same, relative, some_noise, written_aside
from locfast.models.heads import mark_joint_space
from locfast.models.model_card import write_model_card
from locfast.models.softcap import set_softcap


def write_timm_export(
    backbone: Backbone, folder: Path, *, softcap: float | None, card: dict[str, Any], images: Tensor | None = None
) -> float | None:
    """Write `backbone` to `folder` so that plain timm loads it, and measure what the soft cap is worth.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the model, and so does its own architecture with
    `pretrained_cfg_overlay=dict(file="FOLDER/model.safetensors")`. Where the backbone has a linear head, a projection
    into CLIP's joint space, the model has it too, as timm's own CLIP models do. Files of an earlier export there are
    replaced, each at once. card: facts for the README, see `describe_run`. images [B, 3, H, W], normalised: what to
    measure on; noise if not given. Returns how far features are off without the cap (relative L2), None where there is
    no cap.
    """
    plain = plain_timm_model(backbone, head=True)
    on_noise = images is None
    images = (some_noise(backbone) if images is None else images).float().cpu()
    with torch.no_grad():
        features = set_softcap(plain, softcap).forward_features(images)
        uncapped = set_softcap(plain, None).forward_features(images) if softcap is not None else features
    ours = Features(backbone.depth).of(backbone, images[:1], softcap)
    check_same(f"the exported {type(backbone.model).__name__}", features[:1], ours)
    without_cap = None if softcap is None else relative(uncapped, features)
    with written_aside(folder) as aside:
        save_for_hf(plain, str(aside), model_args=_model_args(plain), safe_serialization=True)
        if plain.num_classes:
            mark_joint_space(aside, plain.num_classes)
        measured_on = f"{len(images)} images of {'Gaussian noise' if on_noise else 'the run'}"
        write_model_card(aside / "README.md", backbone, plain, softcap, without_cap, measured_on, card)
    return without_cap


def plain_timm_model(backbone: Backbone, head: bool = False) -> Any:
    """A timm model of the backbone's architecture, on the CPU, in eval mode, holding a copy of its weights.

    head: with the backbone's linear head, where it has one.

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
    classes = model.head.out_features if head and isinstance(model.head, nn.Linear) else 0
    if classes:
        config["num_classes"] = classes
    else:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    with seeded(0):
        plain: Any = timm.create_model(config["architecture"], pretrained_cfg=config, num_classes=classes, **args)
    plain.load_state_dict(state, strict=True)
    if not hasattr(plain, "_model_args"):
        plain._model_args = args
    return plain.eval()


def _model_args(model: Any) -> dict[str, Any]:
    """What beside its name builds the model; no head, whatever it once had."""
    return {key: value for key, value in model._model_args.items() if key != "num_classes"}
