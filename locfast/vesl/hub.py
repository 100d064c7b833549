"""Models of Hugging Face transformers, from a folder or the cache; a missing one is told with the command to get it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from locfast.errors import UserError

EXAMPLE = {
    "--captioner": "Salesforce/blip-image-captioning-large",
    "--detector": "google/owlv2-large-patch14-ensemble",
}


def import_transformers() -> Any:
    # tokenizers' threads are of no use for a few short phrases, and it warns at every fork that follows them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError:
        raise UserError(
            "captioners and detectors come from transformers, which is not installed: pip install transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load(kind: str, name: str, flag: str, **options: Any) -> Any:
    """`transformers.KIND.from_pretrained(name)`. Raises UserError for what is not there, or is no KIND."""
    transformers = import_transformers()
    folder = Path(os.path.expanduser(name))
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not folder.is_dir():
        raise UserError(
            f"{flag} {name}: there is no such folder. Give a model's folder, or a name like {EXAMPLE[flag]}"
        )
    try:
        return getattr(transformers, kind).from_pretrained(str(folder) if folder.is_dir() else name, **options)
    except Exception as error:  # the hub, JSON, safetensors and torch have errors of many kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        do = (
            "Is it the folder that save_pretrained wrote, model and processor?"
            if folder.is_dir()
            else f"Get it with `hf download {name}` (`huggingface-cli download` in older versions), or give a folder"
        )
        raise UserError(f"{flag} {name} cannot be loaded as {kind}: {why}. {do}") from None
