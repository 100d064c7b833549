"""What a command judges: the backbone of a run, an export, or a model by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locfast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from locfast.config.base import TrainConfig
    from locfast.data.spec import CropPolicy
    from locfast.models.backbone import Backbone


OPEN_CLIP = "open_clip"
"""In the place of a run's model: the image tower of the open_clip model that its method names."""


@dataclass(frozen=True)
class JointText:
    """The text side of the joint space that a run's backbone was trained to reach."""

    model: str | None
    """open_clip's name of the model whose text tower it is; None: it has none of that name."""
    pretrained: str | None
    tower: nn.Module | None = None
    """That open_clip model as it goes with the backbone; None: as `pretrained` has it."""


@dataclass(frozen=True)
class Subject:
    """A frozen backbone in evaluation mode, on the CPU, and how its features are taken."""

    backbone: Backbone
    softcap: float | None
    name: str
    """For tables: the run folder's name or the model's."""
    embed: Callable[[Tensor], Tensor] | None = None
    """Tokens behind the final norm [B, T, C] to a joint space [B, E], as the run trained it; None: it trained none. An
    nn.Module or a method of one, on the CPU, or a function that computes wherever its input lies."""
    text: JointText | None = None
    prompter: nn.Module | None = None
    """What was trained with it to embed a box of an image; None: nothing was."""
    crop: CropPolicy | None = None
    """How its run looks at held-out images with boxes; None: it learned of none, or nobody says."""


def open_subject(
    name: str,
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    softcap: float | None = None,
    seed: int = 0,
    ema: bool | None = None,
) -> Subject:
    """A run folder's aligned backbone with the soft cap it was trained with, or any model that `load_backbone` takes.

    An export of a run that learned a projection into a joint space has that projection, and its prompter where one lies
    beside it.

    softcap: for weights that lie in a plain timm folder or file, which does not say under which cap they were trained.
    ema: of a run, its averaged weights (None: where it has any). Raises UserError as `load_method` and
    `load_backbone` do, and where a run is asked for another size, cap or weights than its own.
    """
    from locfast.engine.run_folder import RunFolder, load_method
    from locfast.models.backbone import load_backbone
    from locfast.models.heads import has_joint_space
    from locfast.models.joint import joint_tower

    folder = Path(name)
    if not RunFolder(folder).is_run():
        joint = has_joint_space(name)
        head = {"num_classes": None} if joint else {}
        backbone = (
            load_backbone(name, pretrained, seed=seed, image_size=image_size, **head).eval().requires_grad_(False)
        )
        embed = joint_tower(backbone, name, "--model").embed if joint else None
        prompter, crop = _exported_prompter(name)
        return Subject(backbone, softcap, name, embed, prompter=prompter, crop=crop)
    if image_size is not None or not pretrained or softcap is not None:
        raise UserError(
            f"--model {name} is a run, whose image size, weights and soft cap stand in its config.yaml: leave out "
            "--image-size, --softcap and --no-pretrained, or export it and give the export's folder."
        )
    method = load_method(folder, ema)
    made = method.artifacts()
    if made.get("text") and "text_tower" not in made and not RunFolder(folder).read_config().pretrained:
        made["text"] = {**made["text"], "pretrained": "none"}  # its teacher had random weights: so has the other half
    return replace(_subject(made, folder.resolve().name), prompter=_frozen(made.get("prompter")), crop=_crop(method))


def open_start(run: str) -> Subject:
    """The model that a run began with: its --model, what its method made of that from scratch, or CLIP's own towers.

    From scratch, these are the very weights, positions and colours of the run's first step, and the name says so. It
    has no prompter: that of a first step was drawn at random. Raises UserError as `open_subject` does.
    """
    from locfast.config.registry import method_config
    from locfast.engine.run_folder import RunFolder
    from locfast.methods import create_method

    config = RunFolder(Path(run)).read_config()
    fields = method_config(config)
    how: dict[str, Any] = {"image_size": config.image_size, "seed": config.seed}
    how["pretrained"] = config.pretrained and not fields.from_scratch
    if not own_start(config):
        return open_subject(config.model, **how)
    method = create_method(config.method, fields, model=config.model, **how)
    made = method.artifacts()
    name = made["backbone"].name + (" (random weights)" if fields.from_scratch else "")
    return replace(_subject(made, name), crop=_crop(method))


def own_start(config: TrainConfig) -> bool:
    """Whether a run of `config` began with a model that its method made, and not with `config.model` as it is."""
    from locfast.config.registry import method_config

    return config.model == OPEN_CLIP or method_config(config).from_scratch


def _subject(made: Mapping[str, Any], name: str) -> Subject:
    backbone = made["backbone"].eval().requires_grad_(False)
    return Subject(backbone, made.get("softcap"), name, _frozen(made.get("embed")), _joint_text(made))


def _crop(method: Any) -> CropPolicy | None:
    spec = method.validation_spec()
    return next(iter(spec.views.values())).crop if spec.regions else None


def _exported_prompter(name: str) -> tuple[nn.Module | None, CropPolicy | None]:
    """The prompter that lies beside the weights of an export, and how its run looked at images; None: there is none."""
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if not (folder / "prompter.safetensors").is_file():
        return None, None
    from locfast.models.prompter_file import load_prompter

    told = json.loads((folder / "prompter.json").read_text(encoding="utf-8"))
    return _frozen(load_prompter(folder)), "pad" if told["padded"] else "center"


def _joint_text(made: Mapping[str, Any]) -> JointText | None:
    named, tower = made.get("text"), _frozen(made.get("text_tower"))
    if named is None and tower is None:
        return None
    named = named or {}
    return JointText(named.get("model"), named.get("pretrained"), tower)


def _frozen(part: Any) -> Any:
    """A network, or the one that a method belongs to, made ready for evaluation alone; a plain function as it is."""
    from torch import nn

    for network in (part, getattr(part, "__self__", None)):
        if isinstance(network, nn.Module):
            network.eval().requires_grad_(False)
    return part
