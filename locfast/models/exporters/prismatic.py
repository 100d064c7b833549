"""A backbone and its vision-language adapter for Prismatic VLMs: timm weights, and code that keeps its contract."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import Tensor

from locfast.errors import UserError
from locfast.models.backbone import Backbone
from locfast.models.export import plain_timm_model
from locfast.models.exporters.adapter import Adapter, write_adapter
from locfast.models.exporters.folder import (
    check_same,
    copy_standalone,
    relative,
    some_noise,
    standalone,
    write_aligned,
    written_aside,
)
from locfast.models.model_card import Target, adapter_section, write_model_card


def plain_backbone(backbone: Backbone, blocks: int) -> Any:
    """`plain_timm_model` of the first blocks of a backbone."""
    if blocks == backbone.depth:
        return plain_timm_model(backbone)
    shorter = copy.copy(backbone.model)  # what is inside stays shared; plain_timm_model copies the weights
    shorter._modules = {**backbone.model._modules, "blocks": backbone.blocks[:blocks]}
    shorter._model_args = {**backbone.model._model_args, "depth": blocks}
    return plain_timm_model(Backbone(shorter, backbone.name))


def write_prismatic_export(
    backbone: Backbone,
    folder: Path,
    *,
    softcap: float | None,
    card: dict[str, Any],
    adapter: Adapter,
    images: Tensor | None = None,
) -> float | None:
    """Write backbone and adapter to `folder`, with the two files that Prismatic imports.

    `AlignedViT` of aligned_vit.py is a VisionBackbone, `load_adapter` of maskembed_adapter.py gives the projector.
    images [B, 3, H, W], normalised: what to measure on; noise if not given. Returns how far features are off without
    the cap (relative L2), None where there is none. Raises UserError where the cap is on attention that the plain file
    does not hold, or the image is not square.
    """
    if backbone.image_size[0] != backbone.image_size[1]:
        raise UserError(
            f"--to prismatic: {backbone.name} takes images of {backbone.image_size}; Prismatic's are square."
        )
    features = adapter.features
    plain = plain_backbone(backbone, features.blocks)
    if softcap is not None and not standalone("timm_softcap").supports(plain):
        raise UserError(
            f"--to prismatic: {backbone.name} was trained with a soft cap on attention that the exported code does not "
            "hold (it has timm's ViT and EVA-02). Type --to timm, and give the model its cap by locfast's set_softcap."
        )
    on_noise = images is None
    images = (some_noise(backbone) if images is None else images).float().cpu()
    with written_aside(folder) as aside:
        save_for_hf(plain, str(aside), model_args=_arguments(plain), safe_serialization=True)
        write_aligned(aside, backbone, features, softcap)
        copy_standalone(aside, "aligned_vit", "timm_softcap")
        trained = features.of(backbone, images, softcap)
        vit = standalone("aligned_vit").AlignedViT("aligned", folder=aside)
        with torch.no_grad():
            check_same("the exported backbone", vit(images), trained)
            without_cap = None
            if softcap is not None:
                write_aligned(aside, backbone, features, None)
                without_cap = relative(standalone("aligned_vit").AlignedViT("uncapped", folder=aside)(images), trained)
                write_aligned(aside, backbone, features, softcap)
        write_adapter(aside, adapter, trained[:2])
        measured_on = f"{len(images)} images of {'Gaussian noise' if on_noise else 'the run'}"
        target = Target(
            "timm",
            [_use(vit, adapter), _cap(softcap, without_cap, measured_on), adapter_section(adapter.module.config)],
        )
        write_model_card(aside / "README.md", backbone, plain, softcap, without_cap, measured_on, card, target)
    return without_cap


def _arguments(plain: Any) -> dict[str, Any]:
    return {key: value for key, value in plain._model_args.items() if key != "num_classes"}


def _use(vit: Any, adapter: Adapter) -> str:
    tokens, width = vit.num_patches, vit.embed_dim
    return f"""## Use

Put the path of this folder for FOLDER, and the folder on PYTHONPATH. Its files need timm, torchvision and safetensors,
and not locfast. docs/vlm.md of locfast has the four lines that register both in Prismatic.

```python
from aligned_vit import AlignedViT
from maskembed_adapter import load_adapter

backbone = AlignedViT("aligned", "resize-naive", folder="FOLDER")
adapter = load_adapter("FOLDER").eval()
features = backbone(backbone.image_transform(image)[None])  # [1, {tokens}, {width}]
embeddings = adapter(features)  # [1, {tokens}, {adapter.module.config["llm_width"]}]
```"""


def _cap(softcap: float | None, without_cap: float | None, measured_on: str) -> str:
    if softcap is None:
        return "## Soft cap\n\nNone: plain attention, nothing to add."
    return (
        f"## Soft cap\n\n`AlignedViT` bounds attention logits to {softcap:g} * tanh(logits / {softcap:g}), as training "
        f"did. Without it the features are off by a relative L2 of {without_cap:.2e}, measured on {measured_on}."
    )
