"""A backbone with a fresh linear head, as the plain timm classifier of its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import trunc_normal_
from timm.models import save_for_hf
from torch import nn

from locfast.models.backbone import Backbone
from locfast.models.create import seeded
from locfast.models.exporters.folder import check_same, some_noise, written_aside
from locfast.models.softcap import set_softcap

HEAD_STD = 2e-5
"""Of the head's first weights, as in MAE's fine-tuning: all classes begin alike."""
BEHIND = ("head.", "fc_norm.", "norm.", "attn_pool.")
"""What stands behind the blocks, and may differ between a backbone and a classifier."""


def make_classifier(
    backbone: Backbone, softcap: float | None, num_classes: int, *, pool: str, drop_path: float = 0.0, seed: int = 0
) -> Any:
    """A timm model on the CPU with a copy of the backbone's weights; images [B, 3, H, W] -> logits [B, num_classes].

    pool "mean": the mean of patches behind the last block, then a fresh norm (MAE's); the backbone's final norm is
    left away. "cls": the CLS token behind the final norm, as it was trained (BEiT, which has none, gets a fresh one).
    The head is drawn from `seed`. drop_path grows from 0 at the first block to this rate at the last one. Every
    weight is trainable; nothing of `backbone` is shared. Its `_model_args` build it again, without the drop path.
    """
    model = backbone.model
    fresh_norm = {"fc_norm" if backbone.family == "vit" else "use_fc_norm": pool == "mean"}
    args = {key: value for key, value in model._model_args.items() if key not in ("num_classes", "drop_path_rate")}
    args |= {"global_pool": "avg" if pool == "mean" else "token", **fresh_norm}
    config = {key: value for key, value in model.pretrained_cfg.items() if value is not None}
    with seeded(seed):
        classifier: Any = timm.create_model(
            config["architecture"],
            pretrained_cfg={**config, "num_classes": num_classes},
            num_classes=num_classes,
            drop_path_rate=drop_path,
            **args,
        )
        trunc_normal_(classifier.head.weight, std=HEAD_STD)
    state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(("head.", "fc_norm."))}
    missing, unexpected = classifier.load_state_dict(state, strict=False)
    if wrong := [key for key in (*missing, *unexpected) if not key.startswith(BEHIND)]:
        raise RuntimeError(f"{backbone.name} as a classifier of {config['architecture']} differs in {wrong}")
    nn.init.zeros_(classifier.head.bias)
    classifier._model_args = args
    return set_softcap(classifier, softcap)


def write_classifier(classifier: Any, backbone: Backbone, folder: Path, classes: Sequence[str], told: str) -> None:
    """Write a timm folder: `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the classifier back.

    told: how it was made, for the README. It is loaded and compared before anything replaces an earlier one there.
    """
    softcap = getattr(classifier.blocks[0].attn, "softcap", None)
    images = some_noise(backbone)[:1]
    cap = (
        f"\nIts attention was trained under a soft cap, which timm does not know:\n\n```python\nfrom "
        f"locfast.models.softcap import set_softcap\n\nmodel = set_softcap(model, {softcap})\n```\n"
        if softcap is not None
        else ""
    )
    device, training = next(classifier.parameters()).device, classifier.training
    classifier.cpu().eval()
    try:
        with written_aside(folder) as aside:
            config = {"label_names": list(classes)}
            save_for_hf(classifier, str(aside), config, model_args=classifier._model_args, safe_serialization=True)
            again = set_softcap(timm.create_model(f"local-dir:{aside}", pretrained=True), softcap).eval()
            with torch.no_grad():
                check_same("the written classifier", again(images), classifier(images))
            name = classifier.pretrained_cfg["architecture"]
            (aside / "README.md").write_text(f"# {name}, fine-tuned\n\n{told}\n{cap}", encoding="utf-8")
    finally:
        classifier.to(device).train(training)
