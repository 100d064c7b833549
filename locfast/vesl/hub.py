"""Models of Hugging Face transformers, from a folder or the cache; a missing one is told with the command to get it."""

from __future__ import annotations

import json
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


def check_weights(kind: str, name: str, flag: str) -> None:
    """Raises UserError where weights are missing or cut off, as after half a download; they are not read for that.

    Where the files that transformers itself writes are not all there, it is asked: it may know others, or get them.
    """
    import_transformers()
    from huggingface_hub import try_to_load_from_cache

    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        config = try_to_load_from_cache(name, "config.json")
        folder = Path(config).parent if isinstance(config, str) else folder
    if not _whole(folder):
        load(kind, name, flag)


def _whole(folder: Path) -> bool:
    """Whether a folder has all its weights, by the index of the files and by each file's own head."""
    from safetensors import SafetensorError, safe_open

    files = {"model.safetensors"}
    try:
        index = folder / "model.safetensors.index.json"
        if not (folder / "model.safetensors").exists() and index.exists():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for file in files:
            with safe_open(folder / file, "pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return True
