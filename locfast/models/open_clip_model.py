"""An open_clip model by name, tag, config or checkpoint file: both towers and the tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import locfast
from locfast.errors import UserError, suggest
from locfast.models.create import seeded

INSTALL = "pip install 'locfast[open-clip]'"
DEMO_TEXT = Path(locfast.__file__).parent / "demo" / "text_tower.json"
"""A small text tower, without weights, for the embedded demo of CLOC."""
Flags = tuple[str, str]
"""What the user typed the name and the weights after: errors repeat it."""


@contextmanager
def _root_logger_left_alone() -> Iterator[None]:
    """open_clip speaks through the root logger, which, bare, then gets a handler that repeats all of our lines."""
    stand_in = logging.NullHandler()
    logging.root.addHandler(stand_in)
    try:
        yield
    finally:
        logging.root.removeHandler(stand_in)


@_root_logger_left_alone()
def load_open_clip(name: str, pretrained: str, *, seed: int = 0, flags: Flags) -> tuple[Any, Any]:
    """(model, tokenizer) of open_clip by name, or by a config file (.json), or demo; in evaluation mode, on the CPU.

    pretrained: a tag of open_clip's, a checkpoint file, or "none" for weights drawn from `seed`. Raises UserError
    where open_clip is not installed and where names, files or a network do not lead to a model and its tokenizer.
    """
    by_name, by_weights = flags
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"{by_name} {name} is a model of open_clip, which cannot be imported ({error}). Type {INSTALL}"
        ) from None
    if name == "demo":
        name = str(DEMO_TEXT)
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise UserError(f"{by_name} {name}: no such file. Give a config of open_clip, or a name it knows.")
        _check_config(Path(name), by_name)
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    if name not in open_clip.list_models():
        near = suggest(name, open_clip.list_models())
        raise UserError(
            f"{by_name} {name}: open_clip {open_clip.__version__} has no such model{near or '.'} `python -c 'import "
            "open_clip; print(open_clip.list_models())'` lists them; a config file (.json) works too."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained != "none" and pretrained not in tags and not Path(pretrained).is_file():
        raise UserError(
            f"{by_weights} {pretrained}: neither a file nor weights that open_clip has for {name}"
            f"{suggest(pretrained, tags) or '.'} It has {', '.join(tags) or 'none'}; none draws random ones."
        )
    try:
        with seeded(seed):
            model = open_clip.create_model(name, pretrained=None if pretrained == "none" else pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # the hub, pickle, torch and transformers have errors of many kinds
        told = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise UserError(
            f"{by_name} {name} {by_weights} {pretrained}: open_clip could not load it ({type(error).__name__}: "
            f"{told}). Without a network, fetch its checkpoint elsewhere and type {by_weights} FILE."
        ) from None
    return model.eval(), tokenizer


def _check_config(file: Path, flag: str) -> None:
    """Raise UserError for a file that open_clip would leave out without a word, or not read."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file}: this is no JSON ({error}). Give a config of open_clip.") from None
    needed = ("embed_dim", "vision_cfg", "text_cfg")
    if missing := [key for key in needed if not isinstance(config, dict) or key not in config]:
        raise UserError(f"{flag} {file}: a config of open_clip has {', '.join(needed)}; {missing[0]} is missing.")
