"""Weights from a file on disk into a timm model: timm's own converters, MoCo v3's prefix, and clear refusals."""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor

from locfast.errors import UserError

log = logging.getLogger(__name__)

BEHIND_FEATURES = ("head.", "head_dist.", "fc_norm.", "attn_pool.")
"""Parameters behind the final norm: a file may lack them, or have others."""

Origin = Literal["timm", "mocov3"]


def find_weights(folder: Path) -> Path:
    """The weights file of a local timm folder: model.safetensors, or the first file that may hold weights."""
    patterns = ("model.safetensors", "pytorch_model.bin", "*.safetensors", "*.pth", "*.pth.tar", "*.bin")
    for pattern in patterns:
        if files := sorted(folder.glob(pattern)):
            return files[0]
    raise UserError(
        f"{folder} has a config.json but no weights ({', '.join(patterns)}). Put model.safetensors there, or start "
        "from random weights with --no-pretrained."
    )


def load_checkpoint_file(model: Any, file: Path, name: str) -> Origin:
    """Load `file` into `model`, position embeddings resampled where the image size differs; says where it came from.

    Raises UserError where the file cannot be read, or holds another architecture.
    """
    state = _read(file, name)
    origin: Origin = "timm"
    base = "base_encoder."
    if any(key.startswith(base) for key in state):
        # MoCo v3 saves both encoders and its heads; the base encoder is the one that gradients trained.
        state = {key.removeprefix(base): value for key, value in state.items() if key.startswith(base)}
        origin = "mocov3"
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = model.state_dict()
    try:
        state = state if convert is None else convert(state, model)
    except Exception as error:  # timm's converters index keys and reshape tensors that another architecture lacks
        raise _other_architecture(name, file, model, f"timm cannot convert it: {error!r}") from error
    # a head is loaded where the model was built with one, and then it must be there
    state = {key: value for key, value in state.items() if key in own or not key.startswith("head.")}
    needed = [key for key in own if key.startswith("head.") or not key.startswith(BEHIND_FEATURES)]
    missing = [key for key in needed if key not in state]
    extra = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if wrong:
        found, wanted = list(state[wrong[0]].shape), list(own[wrong[0]].shape)
        raise _other_architecture(name, file, model, f"{wrong[0]} is {found} there and {wanted} in the model")
    if missing:
        detail = f"{len(missing)} of the model's {len(own)} tensors are not in it, first {missing[0]}"
        raise _other_architecture(name, file, model, detail)
    if deeper := [key for key in extra if key.startswith("blocks.")]:
        raise _other_architecture(name, file, model, f"it has {deeper[0]}, which the model has not")
    if extra:
        log.info("%s: %d tensors that are not part of the backbone left out, first %s", file, len(extra), extra[0])
    model.load_state_dict(state, strict=False)
    return origin


def _read(file: Path, name: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint file; no pickled code is run."""
    try:
        state = load_state_dict(str(file), weights_only=True)
    except (AttributeError, TypeError):
        state = {}  # no dictionary where timm looks for one
    except (RuntimeError, pickle.UnpicklingError, SafetensorError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise UserError(
            f"--model {name}: {file} cannot be read as a checkpoint ({type(error).__name__}: {reason}). It is torn, no "
            "checkpoint, or holds pickled Python objects, which are never run. Fetch it again, or save its tensors "
            "with safetensors.torch.save_file and type that file."
        ) from error
    by_name = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not by_name or not any(isinstance(value, Tensor) for value in _leaves(state)):
        raise UserError(
            f"--model {name}: {file} holds no tensors by name. A state dict is needed, bare or under 'state_dict' or "
            "'model'. Save model.state_dict() with safetensors.torch.save_file and type that file."
        )
    return state


def _leaves(state: dict[str, Any]) -> list[Any]:
    """Values of a dictionary and of those one level down (EVA's files nest them under 'module')."""
    return [leaf for value in state.values() for leaf in (value.values() if isinstance(value, dict) else [value])]


def _other_architecture(name: str, file: Path, model: Any, detail: str) -> UserError:
    architecture = model.pretrained_cfg.get("architecture", type(model).__name__)
    return UserError(
        f"--model {name}: {file} is a checkpoint of another model than {architecture}: {detail}. Weights fit only the "
        "architecture that they were trained in. Type that architecture's timm name before the @, for example "
        "vit_large_patch16_224@FILE."
    )
