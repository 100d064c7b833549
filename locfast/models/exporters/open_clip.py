"""A backbone as an image tower of open_clip: its own VisionTransformer for CLIP, its TimmModel for the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from locfast.errors import UserError
from locfast.models.backbone import Backbone
from locfast.models.export import plain_timm_model
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
from locfast.models.exporters.hf_keys import activation_name, tower_kind
from locfast.models.exporters.open_clip_pair import (
    TextHalf,
    check_pair,
    pair_config,
    pair_state,
    why_no_pair,
    write_pair,
)
from locfast.models.model_card import Target, write_model_card

OWN_NAMES = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj": "conv1",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
"""open_clip makes no model without a text tower: the smallest that there is, untrained."""


def timm_to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a timm CLIP as open_clip's VisionTransformer names it, without a projection."""
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            name, _, leaf = rest.rpartition(".")
            new = f"attn.in_proj_{leaf}" if name == "attn.qkv" else f"{OWN_NAMES[name]}.{leaf}"
            out[f"transformer.resblocks.{index}.{new}"] = tensor
        elif key in OWN_NAMES:
            out[OWN_NAMES[key]] = tensor.flatten() if key == "cls_token" else tensor[0]
        else:
            name, _, leaf = key.rpartition(".")
            out[f"{OWN_NAMES[name]}.{leaf}"] = tensor
    return {key: tensor.contiguous().clone() for key, tensor in out.items()}


def write_open_clip_export(
    backbone: Backbone,
    folder: Path,
    *,
    softcap: float | None,
    card: dict[str, Any],
    images: Tensor | None = None,
    text: TextHalf | None = None,
) -> float | None:
    """Write `backbone` to `folder` as visual.safetensors with a model config, for open_clip's own loader.

    text: the text tower trained with it, which then is written too, as a checkpoint of both (open_clip_pair.py).
    `load_model(folder)` of the open_clip_tower.py written beside it gives the model under its cap. Returns how far
    features are off without the cap (relative L2), None where there is none. Raises UserError where open_clip cannot
    build the architecture, or the plain code cannot cap it.
    """
    needs("open_clip", "open-clip", "open_clip")
    plain = plain_timm_model(backbone)
    own = _is_own(backbone)
    if not own:
        _check_timm_tower(backbone, plain, softcap)
    quick = _act(backbone) == "quick_gelu" if own else None
    if text is not None and why_no_pair(backbone, text, quick) is not None:
        text = None
    name = f"aligned-{plain.pretrained_cfg['architecture']}-{backbone.image_size[0]}"
    on_noise = images is None
    images = (some_noise(backbone) if images is None else images).float().cpu()
    with written_aside(folder) as aside:
        state = plain.state_dict()
        kept = {key: value for key, value in state.items() if not key.startswith(("attn_pool.", "fc_norm.", "head."))}
        weights = (
            timm_to_open_clip(kept) if own else {f"trunk.{key}": value.contiguous() for key, value in kept.items()}
        )
        save_file(weights, aside / "visual.safetensors", metadata={"format": "pt"})
        config = _config(backbone, plain, own)
        if text is None:
            (aside / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        else:
            head: Any = backbone.model.head
            vision = {**config["vision_cfg"], **({} if own else {"timm_proj_bias": True})}
            whole = pair_config(text, vision, head.out_features, quick)
            write_pair(aside, name, whole, pair_state(weights, backbone, text, own), backbone, text)
            check_pair(aside, backbone, text, images)
        features = Features(backbone.depth)
        more = {"name": name, "tower": _tower(backbone) if own else None, "both": text is not None}
        write_aligned(aside, backbone, features, softcap, **more)
        copy_standalone(aside, "open_clip_tower", *([] if own else ["timm_softcap"]))
        trained = features.of(backbone, images, softcap)
        without_cap = _check(
            aside, images, trained, softcap, lambda cap: write_aligned(aside, backbone, features, cap, **more)
        )
        measured_on = f"{len(images)} images of {'Gaussian noise' if on_noise else 'the run'}"
        use = _use(backbone, plain, own, softcap, without_cap, measured_on)
        target = Target("open_clip", [use], None if text is None else _both(name))
        write_model_card(aside / "README.md", backbone, plain, softcap, without_cap, measured_on, card, target)
    return without_cap


@torch.no_grad()
def _check(folder: Path, images: Tensor, trained: Tensor, softcap: float | None, write: Any) -> float | None:
    tower = standalone("open_clip_tower")
    model = tower.load_model(folder).eval()
    check_same("the open_clip tower", tower.image_tokens(model.visual, images), trained)
    if softcap is None:
        return None
    write(None)
    uncapped = tower.image_tokens(tower.load_model(folder).eval().visual, images)
    write(softcap)
    return relative(uncapped, trained)


def _arguments(plain: Any) -> str:
    """What beside its name built the model; a final norm that training added to BEiT shows as its global_pool."""
    return ", ".join(f"{key}={value!r}" for key, value in plain._model_args.items() if key != "num_classes")


def _is_own(backbone: Backbone) -> bool:
    """Whether open_clip's VisionTransformer computes it: CLIP's layout, GELU or QuickGELU."""
    try:
        return tower_kind(backbone, "open_clip") == "clip" and _act(backbone) in ("gelu", "quick_gelu")
    except UserError:
        return False


def _act(backbone: Backbone) -> str:
    mlp: Any = backbone.blocks[0].mlp
    return activation_name(mlp.act, "open_clip")


def _tower(backbone: Backbone) -> dict[str, Any]:
    """What `describe` of open_clip_tower.py must find in a tower that is to take the weights."""
    act = "QuickGELU" if _act(backbone) == "quick_gelu" else "GELU"
    return {"act": act, "heads": backbone.num_heads, "eps": backbone.norm_eps}


def _check_timm_tower(backbone: Backbone, plain: Any, softcap: float | None) -> None:
    """open_clip gives timm a name and a pooling and nothing else, so the name alone must build the model."""
    architecture = plain.pretrained_cfg["architecture"]
    with torch.device("meta"):
        bare: Any = timm.create_model(architecture, num_classes=0)
    theirs = {key: value.shape for key, value in bare.state_dict().items()}
    ours = {key: value.shape for key, value in plain.state_dict().items()}
    if theirs != ours:
        raise UserError(
            f"--to open_clip: open_clip builds {architecture} by its name alone, and this backbone was built with "
            f"{_arguments(plain)}. Type --to timm."
        )
    if softcap is not None and not standalone("timm_softcap").supports(plain):
        raise UserError(
            f"--to open_clip: {backbone.name} was trained with a soft cap on attention that the exported code does not "
            "hold (it has timm's ViT and EVA-02). Type --to timm."
        )


def _config(backbone: Backbone, plain: Any, own: bool) -> dict[str, Any]:
    size = backbone.image_size[0]
    if not own:
        pool = getattr(plain, "global_pool", "") or ""
        vision: dict[str, Any] = {
            "timm_model_name": plain.pretrained_cfg["architecture"],
            "timm_model_pretrained": False,
            "timm_pool": pool,
            "timm_proj": "linear",
            "image_size": size,
        }
        return {"embed_dim": 64, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT}
    mlp: Any = backbone.blocks[0].mlp
    vision = {
        "image_size": size,
        "patch_size": backbone.patch_size[0],
        "layers": backbone.depth,
        "width": backbone.embed_dim,
        "head_width": backbone.head_dim,
        "mlp_ratio": mlp.fc1.out_features / backbone.embed_dim,
        "norm_kwargs": {"eps": backbone.norm_eps},
    }
    return {"embed_dim": 64, "quick_gelu": _act(backbone) == "quick_gelu", "vision_cfg": vision, "text_cfg": TEXT}


def no_pair(backbone: Backbone, text: TextHalf) -> str | None:
    """Why an export would hold the image tower alone; None where it holds both."""
    return why_no_pair(backbone, text, _act(backbone) == "quick_gelu" if _is_own(backbone) else None)


def _both(name: str) -> str:
    return f"""## Both towers

`open_clip_model.safetensors` holds image tower, projection, text tower and temperature, as they were trained together.

```python
import open_clip

model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```

`open_clip.add_model_config("FOLDER/{name}.json")` makes it known as {name} as well, with `pretrained=` that file. Where
the projection was trained with a bias and open_clip's has none, the bias lies in the norm before it: embeddings of
images are the trained ones, and tokens behind the norm are off by a constant, which `load_model` takes out again."""


def _use(
    backbone: Backbone, plain: Any, own: bool, softcap: float | None, without_cap: float | None, measured_on: str
) -> str:
    cap = (
        f"`load_model` puts back the soft cap of {softcap:g} that training had. Without it the features are off by a "
        f"relative L2 of {without_cap:.2e}, measured on {measured_on}."
        if softcap is not None
        else "Training had no soft cap."
    )
    tower = (
        "open_clip's VisionTransformer" if own else f"open_clip's TimmModel of {plain.pretrained_cfg['architecture']}"
    )
    return f"""## Use

Put the path of this folder for FOLDER, and the folder on PYTHONPATH. `visual.safetensors` is {tower}.

```python
from open_clip_tower import image_tokens, load_model

model = load_model("FOLDER").eval()  # its text tower is a stand-in where no open_clip_model.safetensors lies here
features = image_tokens(model.visual, images)  # [B, {backbone.num_tokens}, {backbone.embed_dim}], normalised images
```

`load_model("FOLDER", name, pretrained=tag)` takes one of open_clip's own models instead, with its text tower and its
projection. By hand it is `create_model(name, pretrained=tag, pretrained_image_path="FOLDER/visual.safetensors")`, which
checks no key and puts no cap. {cap}"""
