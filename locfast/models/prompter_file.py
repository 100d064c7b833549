"""A trained prompter as files: prompter.safetensors, prompter.json, and a module that reads them without locfast."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from locfast.errors import UserError
from locfast.models.backbone import Backbone
from locfast.models.exporters.folder import STANDALONE, check_same, standalone
from locfast.models.prompter import FREQUENCIES, BoxHead, CrossPrompter, Prompter, RoiPooler

WEIGHTS, CONFIG, MODULE = FILES = ("prompter.safetensors", "prompter.json", "cloc_prompter.py")
KINDS: dict[type[nn.Module], str] = {Prompter: "self", CrossPrompter: "cross", RoiPooler: "roi"}
INLINED = "from locfast.models.prompter import"
AnyPrompter = Prompter | CrossPrompter | RoiPooler


@dataclass(frozen=True)
class Frame:
    """The images that a prompter's tower was trained on."""

    image_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    padded: bool
    """The long side resized and the rest filled with the mean colour; boxes are then in [0, 1] of the padded frame."""


def prompter_config(
    prompter: AnyPrompter,
    box_head: BoxHead | None = None,
    *,
    backbone: Backbone,
    frame: Frame,
    region_scale: float,
) -> dict[str, Any]:
    """What prompter.json holds. region_scale: what cosines of regions and texts are multiplied with."""
    config: dict[str, Any] = {
        "kind": KINDS[type(prompter)],
        "width": prompter.project.in_features,
        "joint": prompter.project.out_features,
        "grid": list(backbone.grid),
        "num_prefix_tokens": backbone.num_prefix_tokens,
        "mlp_ratio": 4.0,
        "box_frequencies": list(FREQUENCIES),
        "roi_size": 7,
        "add_places": False,
    }
    if isinstance(prompter, RoiPooler):
        config |= {"roi_size": prompter.size, "norm_eps": prompter.norm.eps}
    else:
        hidden, width = prompter.fc1.out_features, prompter.width
        ratio = hidden / width
        ratio = ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)
        frequencies = list(prompter.corners.frequencies)
        config |= {"mlp_ratio": ratio, "box_frequencies": frequencies, "norm_eps": prompter.norm1.eps}
        config["add_places"] = prompter.places is not None
    looks = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(frame).items()}
    return {**config, "box_head": box_head is not None, "region_scale": region_scale, **looks}


def save_prompter(
    folder: Path,
    prompter: AnyPrompter,
    box_head: BoxHead | None = None,
    *,
    backbone: Backbone,
    frame: Frame,
    region_scale: float,
) -> dict[str, Any]:
    """Write the two files and cloc_prompter.py to `folder`; returns what prompter.json holds. As `prompter_config`."""
    config = prompter_config(prompter, box_head, backbone=backbone, frame=frame, region_scale=region_scale)
    parts: dict[str, nn.Module | None] = {"prompter": prompter, "box_head": box_head}
    state = {
        f"{part}.{key}": tensor.detach().float().cpu().contiguous()
        for part, module in parts.items()
        if module is not None
        for key, tensor in module.state_dict().items()
    }
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / MODULE).write_text(standalone_text(), encoding="utf-8")
    _check(folder, prompter, box_head, config)
    return config


@torch.no_grad()
def _check(folder: Path, prompter: AnyPrompter, box_head: BoxHead | None, config: dict[str, Any]) -> None:
    """Load what was written as its reader will, and compare. Raises RuntimeError where it gives other embeddings."""
    spec: Any = importlib.util.spec_from_file_location("locfast_written_prompter", folder / MODULE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its annotations are looked up there
    try:
        spec.loader.exec_module(module)
        written = module.load(folder)
    finally:
        del sys.modules[spec.name]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, math.prod(config["grid"]), config["width"], generator=generator)
    boxes = torch.rand(2, 3, 2, 2, generator=generator).sort(2).values.flatten(2)
    where = prompter.project.weight
    with torch.autocast(where.device.type, enabled=False):
        expected = prompter(tokens.to(where), boxes.to(where)).float().cpu()
        check_same("the exported prompter", written(tokens, boxes), expected)
        if box_head is not None and not isinstance(prompter, RoiPooler):
            phrases = torch.randn(2, 1, config["joint"], generator=generator)
            asked = prompter.ask(tokens.to(where))
            found = box_head(prompter.phrases(asked, phrases[:, 0].to(where))).float().cpu()
            check_same("the exported box head", written.grounded(tokens, phrases)[:, 0], found)


def standalone_text() -> str:
    """standalone/cloc_prompter.py with the code of locfast/models/prompter.py in the place of its import.

    So the classes that an export runs are those that were trained, and no second copy of them is kept.
    """
    text = (STANDALONE / MODULE).read_text(encoding="utf-8")
    code = Path(__file__).with_name("prompter.py").read_text(encoding="utf-8")
    _, _, body = code.partition("from __future__ import annotations\n")
    (line,) = [line for line in text.splitlines() if line.startswith(INLINED)]
    return text.replace(line + "\n", f"# locfast/models/prompter.py, as it was when these weights were written\n{body}")


def load_prompter(folder: str | Path) -> AnyPrompter | None:
    """The prompter of an export as locfast's own module, in evaluation mode, on the CPU; None: there is none."""
    config = read_prompter_config(folder)
    if config is None:
        return None
    prompter: AnyPrompter = standalone("cloc_prompter").build_prompter(config)
    prompter.load_state_dict(_state(folder, "prompter"))
    return prompter.eval()


def load_box_head(folder: str | Path) -> BoxHead | None:
    """What finds a phrase's box from `load_prompter(folder).phrases`; None: the folder holds none."""
    config = read_prompter_config(folder)
    if config is None or not config["box_head"]:
        return None
    head = BoxHead(config["joint"])
    head.load_state_dict(_state(folder, "box_head"))
    return head.eval()


def read_prompter_config(folder: str | Path) -> dict[str, Any] | None:
    """prompter.json of an export; None where there is none. Raises UserError where its weights are missing."""
    file = Path(folder) / CONFIG
    if not file.is_file():
        return None
    if not file.with_name(WEIGHTS).is_file():
        raise UserError(f"{folder} has {CONFIG} and no {WEIGHTS}: an export holds both. Write it again.")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def _state(folder: str | Path, part: str) -> dict[str, torch.Tensor]:
    state = load_file(Path(folder) / WEIGHTS)
    return {key.removeprefix(f"{part}."): tensor for key, tensor in state.items() if key.startswith(f"{part}.")}
