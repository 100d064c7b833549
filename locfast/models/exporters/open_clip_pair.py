"""Both towers of a contrastive run as a checkpoint of open_clip, which its own loader takes by file or folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.models.backbone import Backbone
from locfast.models.exporters.folder import check_same

CHECKPOINT, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
"""The names under which open_clip finds both in a folder given as local-dir:FOLDER."""
CAPTIONS = 4
"""Texts of random tokens that a written checkpoint is compared on."""


@dataclass(frozen=True)
class TextHalf:
    """The text tower that was trained with a backbone's projection."""

    name: str
    """open_clip's model, by name or config file (.json), whose text tower it is."""
    tower: Any
    """That model without its image tower; its `logit_scale` is the trained one."""
    padded: bool = False
    """Images were padded to the view, and not cropped."""


def why_no_pair(backbone: Backbone, text: TextHalf, quick: bool | None) -> str | None:
    """Why open_clip cannot hold both towers in one model; None where it can.

    quick: whether the image tower runs QuickGELU, which open_clip sets for both towers; None: the tower is timm's.
    """
    kind, head = type(text.tower).__name__, backbone.model.head
    if not isinstance(head, nn.Linear):
        return "the image tower has no linear projection"
    if kind not in ("CLIP", "CustomTextCLIP"):
        return f"the text tower is that of a {kind}, which is more than two towers"
    acts = {type(module).__name__ for module in text.tower.modules()} & {"GELU", "QuickGELU"}
    if quick is not None and acts and acts != {"QuickGELU" if quick else "GELU"}:
        own = "QuickGELU" if quick else "GELU"
        return f"the image tower runs {own} and the text tower {', '.join(acts)}, and open_clip has one for both"
    if quick is not None and head.bias is not None:
        bias = head.bias.detach().cpu().double()
        missed = (head.weight.detach().cpu().double() @ norm_shift(head).double() - bias).norm()
        if missed > 1e-4 * bias.norm():  # fp32 leaves 1e-7; a joint space wider than the tower leaves much
            return "its projection has a bias that open_clip's has not, and the norm before it cannot take it over"
    return None


def pair_config(text: TextHalf, vision: dict[str, Any], embed_dim: int, quick: bool | None) -> dict[str, Any]:
    """A model config of open_clip with the image tower `vision` and this text tower."""
    import open_clip

    if text.name.endswith(".json"):
        try:
            known = json.loads(Path(text.name).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--to open_clip: the run's text tower is described by {text.name}: {error}") from None
    else:
        known = open_clip.get_model_config(text.name)
    own: dict[str, Any] = {"embed_dim": embed_dim, "vision_cfg": vision}
    own |= {"custom_text": True} if hasattr(text.tower, "text") else {}
    own |= {} if quick is None else {"quick_gelu": quick}
    return {**known, **own}


def pair_state(visual: dict[str, Tensor], backbone: Backbone, text: TextHalf, own: bool) -> dict[str, Tensor]:
    """Weights of both towers under open_clip's names. visual: those of the image tower without its projection.

    own: the tower is open_clip's VisionTransformer, whose projection has no bias. What ours has goes into the bias of
    the norm before it, the smallest shift that the projection turns into it: images' embeddings stay, and patch tokens
    behind the norm move by that one vector, for which `norm_shift` is there.
    """
    head: Any = backbone.model.head
    weight = head.weight.detach().cpu().float()
    state = {f"visual.{key}": tensor for key, tensor in visual.items()}
    if own:
        state |= {"visual.proj": weight.T.contiguous(), "visual.ln_post.bias": visual["ln_post.bias"].float().clone()}
        state["visual.ln_post.bias"] += norm_shift(head)
    else:
        bias = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().cpu().float()
        state |= {"visual.head.proj.weight": weight.clone(), "visual.head.proj.bias": bias.clone()}
    return {**state, **{key: tensor.detach().cpu().clone() for key, tensor in text.tower.state_dict().items()}}


def norm_shift(head: nn.Linear) -> Tensor:
    """The shortest vector [C] that a linear layer's weight turns into its bias; zeros where it has none."""
    weight = head.weight.detach().cpu().double()
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().cpu()
    return (torch.linalg.pinv(weight) @ bias.double()).float()


def write_pair(
    folder: Path,
    name: str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    backbone: Backbone,
    text: TextHalf,
) -> None:
    """The checkpoint, NAME.json for `create_model(NAME, pretrained=FILE)`, and the config for local-dir:FOLDER."""
    save_file(state, folder / CHECKPOINT, metadata={"format": "pt"})
    _write_json(folder / f"{name}.json", config)
    seen: dict[str, Any] = {"size": list(backbone.image_size), "mean": list(backbone.mean), "std": list(backbone.std)}
    seen["interpolation"] = "bilinear" if backbone.interpolation == "bilinear" else "bicubic"
    seen["resize_mode"] = "longest" if text.padded else "shortest"
    if text.padded:
        seen["fill_color"] = [round(255 * mean) for mean in backbone.mean]
    _write_json(folder / CONFIG, {"model_cfg": config, "preprocess_cfg": seen})


@torch.no_grad()
def check_pair(folder: Path, backbone: Backbone, text: TextHalf, images: Tensor) -> None:
    """Load the checkpoint by open_clip's own call, and compare. Raises RuntimeError where it embeds otherwise."""
    import open_clip

    model: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    training, head = backbone.training, next(backbone.parameters())
    embedded = backbone.model.head(backbone.eval()(images.to(head.device))[:, 0]).float().cpu()
    backbone.train(training)
    check_same("the open_clip image tower", model.encode_image(images), embedded)
    length, vocabulary = model.context_length, getattr(model, "vocab_size", 1000)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocabulary, (CAPTIONS, length), generator=generator)
    there = text.tower.logit_scale.device
    tuned = text.tower.training
    expected = text.tower.eval().encode_text(tokens.to(there)).float().cpu()
    text.tower.train(tuned)
    check_same("the open_clip text tower", model.encode_text(tokens), expected)
    check_same("open_clip's logit_scale", model.logit_scale[None], text.tower.logit_scale[None].float().cpu())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
