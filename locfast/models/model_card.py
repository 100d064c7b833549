"""The README of an export: where the weights come from, how to load them, and what the soft cap changes."""

from __future__ import annotations

import datetime
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from locfast import __version__
from locfast.models.backbone import Backbone

JOINT = """## Joint space

The model's `head` is a projection into the joint space of images and texts of the CLIP tower that it learned from:
`model(images)` gives an image's embedding, as timm's own CLIP models do. Normalise it, and compare it with embeddings
of that CLIP's text tower."""

JOINT_WITH_TEXT = """## Joint space

The model's `head` is a projection into a joint space of images and texts: `model(images)` gives an image's embedding,
as timm's own CLIP models do. Normalise it, and compare it with embeddings of the text tower that was trained with it,
which this format does not hold: `--to open_clip` writes both."""

LEFT_OUT = """## What is left out

The projection into a joint space with texts that the run trained: this format has no place for it. `--to timm` keeps
it, and `--to open_clip` a text tower that was trained with it."""

TRAINED_LOCALLY = (
    "Blocks and final norm were trained for patch features; it has no classifier and no projection to text."
)
TRAINED_JOINTLY = "Its head projects every token into a space that it shares with texts."

NOT_KEPT = """## What is not kept

Zero-shot classification and retrieval, where the base model had them. Nothing in the training keeps the path from a
pooled image embedding to the text tower, and no text tower is retrained to follow. A projection or a pooling head of
the base model, put on these features, means nothing."""

NEVER_HAD = """## What it cannot do

Zero-shot classification and retrieval: it began with random weights, and nothing in the training tied it to texts. A
head of the pretrained model of this architecture, put on these features, means nothing."""


@dataclass(frozen=True)
class Target:
    """What the card of another format says in place of how timm loads the weights. library: as hubs name it."""

    library: str
    sections: list[str]
    joint: str | None = None
    """How a text tower goes with it, where it does."""


def describe_run(
    config: dict[str, Any],
    metrics: list[dict[str, Any]],
    step: int,
    averaged: bool,
    from_scratch: bool = False,
) -> dict[str, Any]:
    """Facts for a model card. config: the run's, as plain values; metrics: the lines of metrics.jsonl; step: at which
    the exported weights were taken; averaged: whether they are the moving average; from_scratch: whether they began as
    random ones, so that no licence comes with them."""
    last: dict[str, float] = {}
    for line in metrics:
        if line.get("step", 0) <= step:
            last.update({key: value for key, value in line.items() if "loss" in key and isinstance(value, int | float)})
    return {
        "method": config.get("method"),
        "data": config.get("data"),
        "recipe": config.get("recipe"),
        "steps": step,
        "weights": "exponential moving average" if averaged else "of the last step",
        "metrics": last,
        "config": config,
        "from_scratch": from_scratch,
    }


def write_model_card(
    path: Path,
    backbone: Backbone,
    plain: Any,
    softcap: float | None,
    without_cap: float | None,
    measured_on: str,
    card: dict[str, Any],
    target: Target | None = None,
) -> None:
    """Write the card of `plain`, the timm model exported from `backbone`. `without_cap` is the relative L2 between its
    features without and with the cap, measured on `measured_on`. target: where the export is for another loader."""
    apart = ("metrics", "config", "from_scratch", "prompter", "joint")
    facts = {key: value for key, value in card.items() if key not in apart and value is not None}
    trained_with = card.get("joint")
    both = target.joint if target else None
    joint, from_scratch = bool(plain.num_classes) or both is not None, bool(card.get("from_scratch"))
    origin = "architecture, from random weights" if from_scratch else "base model"
    sections = [
        _front_matter(plain, target.library if target else "timm"),
        f"# {_title(backbone, facts)}\n\nA Vision Transformer backbone, written by locfast {__version__} on "
        f"{datetime.date.today().isoformat()}. {TRAINED_JOINTLY if joint else TRAINED_LOCALLY}",
        *(target.sections if target else [_loading(plain), _softcap(softcap, without_cap, measured_on)]),
        both or _joint(joint, trained_with, from_scratch),
        *([prompter_section(card["prompter"])] if card.get("prompter") else []),
        _images(backbone),
        "## Training\n\n" + _table({origin: backbone.name, **facts}),
    ]
    if card.get("metrics"):
        sections.append("## Metrics\n\nThe last values that the run logged.\n\n" + _table(card["metrics"]))
    if card.get("config"):
        values = yaml.safe_dump(card["config"], sort_keys=False, width=110)
        sections.append(f"## Configuration\n\n```yaml\n{values}```")
    versions = {"locfast": __version__, "torch": torch.__version__, "timm": timm.__version__}
    sections.append("## Versions\n\n" + _table({**versions, "python": platform.python_version()}))
    sections.append(_licence(plain, from_scratch))
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _joint(has_head: bool, trained_with: str | None, from_scratch: bool) -> str:
    """What the weights have to do with texts. trained_with: "teacher" or "text", where a projection was trained."""
    if has_head:
        return JOINT if trained_with != "text" else JOINT_WITH_TEXT
    return LEFT_OUT if trained_with else NEVER_HAD if from_scratch else NOT_KEPT


def _title(backbone: Backbone, facts: dict[str, Any]) -> str:
    name = backbone.model.pretrained_cfg.get("architecture", backbone.name)
    return f"{name}, {facts['method']}" if facts.get("method") else str(name)


def _front_matter(plain: Any, library: str) -> str:
    config = plain.pretrained_cfg
    lines = [f"library_name: {library}", "tags: [image-feature-extraction, locality-alignment, locfast]"]
    if config.get("license"):
        lines.append(f"license: {config['license']}")
    if config.get("hf_hub_id") and "/" in config["hf_hub_id"]:
        lines.append(f"base_model: {config['hf_hub_id'].partition('@')[0]}")
    return "---\n" + "\n".join(lines) + "\n---"


def adapter_section(config: dict[str, Any]) -> str:
    """What the adapter of an export is. config: its adapter.json."""
    width = config["llm_width"]
    kinds = {
        "maskembed": "The decoder that MaskEmbed trained: the encoder's head, prefix positions set to zero, the "
        f"decoder's positions, {config['depth']} blocks and norm; then a new linear layer to {width}, zero before the "
        "VLM is trained",
        "truncated": f"The backbone's last {config['depth']} blocks and final norm, which the backbone here lacks; "
        f"then a new linear layer to {width}, zero before the VLM is trained",
        "mlp": f"Two new linear layers to {width} with a GELU between, nothing trained",
    }
    act = f" Its blocks run {config['act']}, as they were trained." if "act" in config else ""
    return (
        "## Adapter\n\n`adapter.safetensors`, loaded by `load_adapter` of `maskembed_adapter.py`. "
        f"{kinds[config['kind']]}. {config['num_tokens']} tokens of width {config['width']} go in and as many come "
        f"out.{act} Train it with the language model, the backbone frozen. Another width: "
        "`load_adapter(FOLDER, llm_width=...)`."
    )


def prompter_section(config: dict[str, Any]) -> str:
    """What the prompter beside a tower is. config: its prompter.json."""
    kinds = {
        "self": "one block of attention over a prompt and all patch tokens",
        "cross": "one block of attention from a prompt to the patch tokens",
        "roi": "RoI-align on the patch tokens, the baseline (it needs torchvision)",
    }
    images = (
        "Images were padded: the long side resized, the rest the mean colour. Boxes lie in [0, 1] of that frame, and "
        "`pad_image` makes both."
        if config["padded"]
        else "Images were cropped and not padded: boxes lie in [0, 1] of what the tower sees."
    )
    finds = (
        "`prompter.grounded(patches, phrases)` finds the boxes of phrases, given their text embeddings, not normalised."
        if config["box_head"]
        else "It was trained without grounding and finds no boxes for phrases."
    )
    tokens = f"[1, {math.prod(config['grid'])}, {config['width']}]"
    return f"""## Prompter

CLOC's: {kinds[config["kind"]]}. From boxes to region embeddings of width {config["joint"]}, in the joint space of
images and texts. `cloc_prompter.py` needs torch and not locfast; put the folder on PYTHONPATH.

```python
import torch
from cloc_prompter import load, pad_image

prompter = load("FOLDER")
pixels, place = pad_image(image, prompter.config)
boxes = place(torch.tensor([[40.0, 12.0, 96.0, 80.0]]))  # left, top, right, bottom in pixels of the image
regions = prompter(patches, boxes[None])  # patches {tokens}, last block, final norm
```

`prompter.region_tokens(patches, boxes)` gives what stands before the projection, of width {config["width"]}. {images}
{finds} Cosines with text embeddings were multiplied with {config["region_scale"]:.4g} in training."""


def architecture_call(plain: Any) -> str:
    """The timm call that loads the weights into the original architecture."""
    config = plain.pretrained_cfg
    name = config["architecture"]
    tagged = f"{name}.{config.get('tag')}"
    name = tagged if tagged in timm.list_pretrained() else name
    args = {"num_classes": plain.num_classes, **{k: v for k, v in plain._model_args.items() if k != "num_classes"}}
    given = "".join(f"{key}={value!r}, " for key, value in args.items())
    return (
        f'timm.create_model("{name}", pretrained=True, {given}'
        'pretrained_cfg_overlay=dict(file="FOLDER/model.safetensors", custom_load=False))'
    )


def _loading(plain: Any) -> str:
    return f"""## Use

Put the path of this folder for FOLDER. `forward_features` gives one vector a token, prefix tokens first.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model.forward_features(transform(image)[None])  # [1, tokens, {plain.embed_dim}]
patches = features[:, {plain.num_prefix_tokens}:]
```

The same weights in the original architecture (its number of classes is what their head gives; image settings as below):

```python
model = {architecture_call(plain)}
```"""


def _softcap(softcap: float | None, without_cap: float | None, measured_on: str) -> str:
    if softcap is None:
        return "## Soft cap\n\nNone: plain attention, nothing to add."
    return f"""## Soft cap

The weights were trained with attention logits bounded to {softcap:g} * tanh(logits / {softcap:g}). The cap is part of
the forward pass and not of the weights, so plain timm does not know of it. One line puts it back:

```python
from locfast.models.softcap import set_softcap

model = set_softcap(model, {softcap})
```

Without it the features of these weights are off by a relative L2 of {without_cap:.2e}, measured on {measured_on}."""


def _images(backbone: Backbone) -> str:
    height, width = backbone.image_size
    facts = {
        "size": f"{height} x {width} px",
        "mean": backbone.mean,
        "std": backbone.std,
        "resize": f"crop_pct {backbone.crop_pct}, {backbone.interpolation}",
        "patches": f"{backbone.grid[0]} x {backbone.grid[1]} of {backbone.patch_size[0]} px",
        "prefix tokens": backbone.num_prefix_tokens,
        "width": backbone.embed_dim,
    }
    return "## Images and tokens\n\n" + _table(facts)


def _licence(plain: Any, from_scratch: bool) -> str:
    if from_scratch:
        return (
            "## Licence\n\nThese weights derive from no others: they began as random ones. Who trained them says how "
            "they may be used, within what the data allow. locfast itself is under Apache-2.0."
        )
    known = plain.pretrained_cfg.get("license")
    terms = f"timm states `{known}` for them" if known else "this file does not know it: look where they came from"
    return (
        "## Licence\n\nThese weights derive from the base model's and stay under its licence; "
        f"{terms}. locfast itself is under Apache-2.0."
    )


def _table(facts: dict[str, Any]) -> str:
    rows = [f"| {key} | {f'{value:.6g}' if isinstance(value, float) else value} |" for key, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
