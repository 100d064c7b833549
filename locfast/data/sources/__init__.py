"""Sources: where encoded samples come from. `open_source` chooses by what it is told; nothing here decodes."""

from __future__ import annotations

import os
from pathlib import Path

from locfast.data.sources.class_folder import ClassFolder
from locfast.data.sources.file_list import FileList
from locfast.data.sources.folder import ImageFolder, LabelledFolder, is_image
from locfast.data.sources.json_lines import JsonLines
from locfast.data.sources.shard_names import expand, shards_among
from locfast.data.sources.split import hold_out, sample_name
from locfast.data.sources.stores import Disk, Store
from locfast.data.sources.tar_shards import TarShards
from locfast.data.sources.web import Web, find_urls, is_url
from locfast.data.spec import Source
from locfast.errors import UserError, suggest

__all__ = [
    "ClassFolder",
    "FileList",
    "ImageFolder",
    "JsonLines",
    "LabelledFolder",
    "TarShards",
    "find_shards",
    "hold_out",
    "open_source",
    "sample_name",
]

DEMO_SCENES = 4096
KINDS = (
    "an image folder, a .txt file list, a .jsonl list of images with texts, .tar shards (a folder or a pattern like "
    "shard-{000..012}.tar), or demo"
)


def open_source(spec: str, *, seed: int = 0) -> Source:
    """The source that `spec` names.

    An image folder; a folder with `images/` and `annotations/` (label maps); a .txt file list; a .jsonl list of images
    with texts; a .tar shard, a folder of them, or a pattern (`shard-{000..012}.tar`, `*.tar`), also by URL
    (`s3://...`); `demo` or `demo:COUNT` for scenes drawn from `seed`.
    Raises UserError for every mistake.
    """
    if not spec.strip():  # "" would be the current folder: most often a shell variable that is not set
        raise UserError(f"asked for the data '{spec}', found no name; --data takes {KINDS}")
    if spec == "demo" or spec.startswith("demo:"):
        return _scenes(spec, seed)
    if is_url(spec):
        return TarShards(find_urls(spec), spec, Web(spec))
    path = Path(os.path.expanduser(spec))
    if not path.exists() and any(c in spec for c in "{}*?["):
        return TarShards(expand(str(path)), spec)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise UserError(f"asked for the data {spec}, found no such file or folder{_near(path)}; --data takes {KINDS}")
    if path.suffix == ".tar":
        return TarShards([path])
    if path.suffix == ".txt":
        return FileList(path)
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if is_image(path.name):
        raise UserError(f"asked for the data {spec}, found a single image; give its folder: {path.parent}")
    raise UserError(
        f"asked for the data {spec}, found a file that is neither .txt nor .tar nor .jsonl; --data takes {KINDS}"
    )


def find_shards(spec: str) -> tuple[list[str], Store]:
    """The tar shards that `spec` names as in `open_source`, and where they lie; nothing of them is read.

    Raises UserError where it names none.
    """
    if is_url(spec):
        return find_urls(spec), Web(spec)
    path = Path(os.path.expanduser(spec))
    if not path.exists() and any(c in spec for c in "{}*?["):
        return [str(one) for one in expand(str(path))], Disk()
    shards = [str(path / name) for name in shards_among(os.listdir(path))] if path.is_dir() else [str(path)]
    if not path.exists() or not shards or not shards[0].endswith(".tar"):
        found = "no such file or folder" + _near(path) if not path.exists() else "no .tar file there"
        raise UserError(
            f"asked for the shards {spec}, found {found}; give a shard, a folder of shards, or a pattern like "
            "shard-{000..012}.tar"
        )
    return shards, Disk()


def _folder(path: Path) -> Source:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise UserError(
            f"asked for the data {path}, found a folder that cannot be read ({error.strerror}); "
            "give read and execute permission, or choose another --data"
        ) from None
    if not names:
        raise UserError(f"asked for the data {path}, found an empty folder; --data takes {KINDS}")
    if shards := shards_among(names):
        return TarShards([path / name for name in shards], str(path))
    if {"images", "annotations"} <= set(names):
        return LabelledFolder(path)
    return ImageFolder(path)


def _scenes(spec: str, seed: int) -> Source:
    from locfast.data.scenes import SceneSource  # the only source that needs torch to open

    _, _, count = spec.partition(":")
    if count and not (count.isdigit() and int(count) > 0):
        raise UserError(f"asked for the data {spec}, found no number of scenes after the colon; write e.g. demo:4096")
    return SceneSource(int(count or DEMO_SCENES), seed)


def _near(path: Path) -> str:
    try:
        return suggest(path.name, os.listdir(path.parent))
    except OSError:
        return ""
