"""A backbone as transformers' CLIP or SigLIP vision tower, and as LLaVA's: weights, configs, code for the soft cap."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from locfast.models.backbone import Backbone
from locfast.models.exporters.adapter import Adapter, write_adapter
from locfast.models.exporters.folder import (
    Features,
    check_same,
    copy_standalone,
    needs,
    relative,
    some_noise,
    standalone,
    write_aligned,
    written_aside,
)
from locfast.models.exporters.hf_keys import Kind, activation_name, timm_to_hf, tower_kind
from locfast.models.exporters.prismatic import plain_backbone
from locfast.models.model_card import Target, adapter_section, write_model_card

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""PIL's numbers, by timm's names."""


@dataclass(frozen=True)
class Differences:
    """Relative L2 of patch tokens from the trained features, measured when the export was written."""

    exported: float
    without_cap: float | None
    without_norm: float
    penultimate: float
    """What LLaVA takes by default: the output of the block before the last, without norm."""


def write_hf_export(
    backbone: Backbone, folder: Path, *, softcap: float | None, card: dict[str, Any], images: Tensor | None = None
) -> Differences:
    """Write `backbone` to `folder` as CLIPVisionModel or SiglipVisionModel, and measure what cap and norm are worth.

    `load_tower(folder)` of the aligned_tower.py written beside it gives the model under its cap. images [B, 3, H, W],
    normalised: what to measure on; noise if not given. Raises UserError where transformers has no such tower.
    """
    return _write(backbone, folder, softcap, card, images, None, "hf")


def write_llava_export(
    backbone: Backbone,
    folder: Path,
    *,
    softcap: float | None,
    card: dict[str, Any],
    adapter: Adapter,
    images: Tensor | None = None,
) -> Differences:
    """Write the tower and its vision-language adapter to `folder`; else as `write_hf_export`."""
    return _write(backbone, folder, softcap, card, images, adapter, "llava")


def _write(
    backbone: Backbone,
    folder: Path,
    softcap: float | None,
    card: dict[str, Any],
    images: Tensor | None,
    adapter: Adapter | None,
    target: str,
) -> Differences:
    kind = tower_kind(backbone, target)
    needs("transformers", "hf", target)
    features = adapter.features if adapter else Features(backbone.depth)
    plain = plain_backbone(backbone, features.blocks)
    on_noise = images is None
    images = (some_noise(backbone) if images is None else images).float().cpu()
    with written_aside(folder) as aside:
        save_file(timm_to_hf(plain.state_dict()), aside / "model.safetensors", metadata={"format": "pt"})
        _write_json(aside / "config.json", _model_config(backbone, kind, features.blocks, target))
        _write_json(aside / "preprocessor_config.json", _processor_config(backbone, kind, target))
        write_aligned(aside, backbone, features, softcap)
        copy_standalone(aside, "aligned_tower")
        if adapter:
            taken = Features(features.blocks, features.norm, features.prefix).of(backbone, images[:2], softcap)
            write_adapter(aside, adapter, taken)
        differences = _measure(aside, backbone, features, softcap, images)
        measured_on = f"{len(images)} images of {'Gaussian noise' if on_noise else 'the run'}"
        sections = [_use(kind, backbone, features, adapter), _what_counts(differences, softcap, measured_on)]
        sections += [adapter_section(adapter.module.config)] if adapter else []
        library = Target("transformers", sections)
        write_model_card(
            aside / "README.md", backbone, plain, softcap, differences.without_cap, measured_on, card, library
        )
    return differences


@torch.no_grad()
def _measure(
    folder: Path, backbone: Backbone, features: Features, softcap: float | None, images: Tensor
) -> Differences:
    """Load the written tower as its reader will, and compare. Raises RuntimeError where it gives other features."""
    tower_file = standalone("aligned_tower")
    tower = tower_file.load_tower(folder)
    trained = features.of(backbone, images, softcap)
    exported = check_same("the exported tower", tower_file.tower_features(tower, images), trained)
    prefix = backbone.num_prefix_tokens if features.prefix else 0

    def distance(tokens: Tensor) -> float:
        return relative(tokens[:, backbone.num_prefix_tokens :], trained[:, prefix:])

    before_norm = tower_file.tower_features(tower, images, norm=False, prefix=True)
    earlier = tower(images, output_hidden_states=True).hidden_states[-2]
    without_cap = None
    if softcap is not None:
        tower.set_attn_implementation("eager")
        without_cap = distance(tower_file.tower_features(tower, images, prefix=True))
    return Differences(exported, without_cap, distance(before_norm), distance(earlier))


def _model_config(backbone: Backbone, kind: Kind, depth: int, target: str) -> dict[str, Any]:
    mlp: Any = backbone.blocks[0].mlp
    config = {
        "architectures": ["CLIPVisionModel" if kind == "clip" else "SiglipVisionModel"],
        "model_type": f"{kind}_vision_model",
        "hidden_size": backbone.embed_dim,
        "intermediate_size": mlp.fc1.out_features,
        "num_hidden_layers": depth,
        "num_attention_heads": backbone.num_heads,
        "num_channels": 3,
        "image_size": backbone.image_size[0],
        "patch_size": backbone.patch_size[0],
        "hidden_act": activation_name(mlp.act, target),
        "layer_norm_eps": backbone.norm_eps,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }
    # Without this transformers would draw an attention-pooling head, which is not part of an aligned backbone.
    return {**config, "vision_use_head": False} if kind == "siglip" else config


def _processor_config(backbone: Backbone, kind: Kind, target: str) -> dict[str, Any]:
    """CLIP's processor resizes the short side and crops, SigLIP's squashes. LLaVA asks for CLIP's `crop_size`."""
    size = backbone.image_size[0]
    config = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": RESAMPLE[backbone.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
    }
    if kind == "siglip" and target == "hf":
        return {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}, **config}
    crop = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size}}
    return {"image_processor_type": "CLIPImageProcessor", **crop, **config}


def _use(kind: Kind, backbone: Backbone, features: Features, adapter: Adapter | None) -> str:
    name = "CLIPVisionModel" if kind == "clip" else "SiglipVisionModel"
    tokens = backbone.num_tokens if features.prefix else backbone.num_patches
    more = ""
    if adapter:
        more = (
            '\nfrom maskembed_adapter import load_adapter\n\nadapter = load_adapter("FOLDER").eval()\n'
            f"embeddings = adapter(features)  # [1, {tokens}, {adapter.module.config['llm_width']}]\n"
        )
    return f"""## Use

Put the path of this folder for FOLDER, and the folder on PYTHONPATH. `aligned_tower.py` needs transformers and not
locfast.

```python
from aligned_tower import load_tower, tower_features
from transformers import AutoImageProcessor

tower = load_tower("FOLDER")  # {name}, its soft cap installed
pixels = AutoImageProcessor.from_pretrained("FOLDER")(images=image, return_tensors="pt")["pixel_values"]
features = tower_features(tower, pixels)  # [1, {tokens}, {backbone.embed_dim}]
{more}```

`{name}.from_pretrained("FOLDER")` loads the same weights without the cap, and without a word of it."""


def _what_counts(differences: Differences, softcap: float | None, measured_on: str) -> str:
    rows = {
        "this export, loaded as above": differences.exported,
        "without the soft cap": differences.without_cap if softcap is not None else "no cap in training",
        "without the final norm": differences.without_norm,
        "one block earlier, without norm (LLaVA's layer -2)": differences.penultimate,
    }
    lines = [f"| {key} | {f'{value:.2e}' if isinstance(value, float) else value} |" for key, value in rows.items()]
    return (
        f"## How far other features are off\n\nRelative L2 of the patch tokens, measured on {measured_on}.\n\n"
        + "\n".join(["| tokens | difference |", "|---|---|", *lines])
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
