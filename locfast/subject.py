"""What a command judges: the backbone of a run, an export, or a model by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from locfast.errors import UserError

if TYPE_CHECKING:
    from locfast.models.backbone import Backbone


@dataclass(frozen=True)
class Subject:
    """A frozen backbone in evaluation mode, on the CPU, and how its features are taken."""

    backbone: Backbone
    softcap: float | None
    name: str
    """For tables: the run folder's name or the model's."""


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

    softcap: for weights that lie in a plain timm folder or file, which does not say under which cap they were trained.
    ema: of a run, its averaged weights (None: where it has any). Raises UserError as `load_method` and
    `load_backbone` do, and where a run is asked for another size, cap or weights than its own.
    """
    from locfast.engine.run_folder import RunFolder, load_method
    from locfast.models.backbone import load_backbone

    folder = Path(name)
    if not RunFolder(folder).is_run():
        backbone = load_backbone(name, pretrained, seed=seed, image_size=image_size).eval()
        return Subject(backbone.requires_grad_(False), softcap, name)
    if image_size is not None or not pretrained or softcap is not None:
        raise UserError(
            f"--model {name} is a run, whose image size, weights and soft cap stand in its config.yaml: leave out "
            "--image-size, --softcap and --no-pretrained, or export it and give the export's folder."
        )
    made = load_method(folder, ema).artifacts()
    backbone = made["backbone"]
    return Subject(backbone.eval().requires_grad_(False), made.get("softcap"), folder.resolve().name)
