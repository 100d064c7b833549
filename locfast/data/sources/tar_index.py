"""Where every sample of a tar shard lies: read once, kept beside the shard, so that shards have random access."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from locfast.data.sources.folder import is_image
from locfast.errors import UserError

VERSION = 1
FIELDS = ("image", "text", "regions", "label_map")
LABEL_MAPS = ("seg.png", "label_map.png")


@dataclass(frozen=True)
class TarIndex:
    """Byte ranges of a shard's samples, in the order of their first members."""

    keys: tuple[str, ...]
    """Members' paths up to the first dot of the base name: webdataset's key."""
    place: np.ndarray
    """[samples, 4, 2] int64: offset and size in bytes of image, text, regions, label map; offset -1: not there."""


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.npz")


def cached_index_path(shard: str) -> Path:
    """Where the index of a shard (an absolute path, or a URL) goes when it cannot lie beside the shard."""
    base = os.environ.get("LOCFAST_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "locfast"
    )
    return Path(base) / "tar-index" / (hashlib.sha256(os.fsencode(shard)).hexdigest()[:32] + ".npz")


def kept(path: Path, stamp: np.ndarray) -> TarIndex | None:
    """The index in a file, where one is there that belongs to a shard of this stamp (version, size, time) int64."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if not np.array_equal(file["stamp"], stamp):
                return None
            keys = json.loads(file["keys"].tobytes().decode("utf-8", "surrogateescape"))
            return TarIndex(tuple(keys), file["place"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write(path: Path, index: TarIndex, stamp: np.ndarray) -> bool:
    """Write aside and rename, so that other ranks see a whole index or none. False where that is not allowed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".index-", suffix=".tmp")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            keys = np.frombuffer(json.dumps(index.keys).encode("utf-8", "surrogateescape"), dtype=np.uint8)
            np.savez(file, stamp=stamp, keys=keys, place=index.place)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except OSError:
        os.unlink(aside)
        return False
    return True


def scan(shard: str, file: IO[bytes], size: int) -> TarIndex:
    """Read the headers of a shard. Members of a sample share a key; a later member of the same name wins, as in tar.

    `file` is the shard, open and seekable, `size` its bytes. Raises UserError for a shard that is compressed, broken or
    cut off, OSError where the file cannot be read.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    # A single-part extension (a.jpg) goes before one of several parts (a.crop.jpg) for the place of the image.
    exact: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg() or os.path.basename(member.name).startswith("."):
                    continue
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                key, kind = os.path.join(folder, stem), field_of(extension)
                if kind is None or (kind == "image" and "." in extension and key in exact):
                    continue
                if kind == "image" and "." not in extension:
                    exact.add(key)
                row = places.setdefault(key, [(-1, 0)] * len(FIELDS))
                row[FIELDS.index(kind)] = (member.offset_data, member.size)
            end, members = tar.offset, len(tar.getmembers())
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter of a size that no offset can hold
        file.seek(0)
        packed = file.read(6)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
        why = "it is compressed, which allows no random access" if packed else f"it is no tar archive ({error})"
        do = "unpack it (gunzip) first" if packed else "make it again, or leave it out"
        raise UserError(f"asked for the shard {shard}, found a file that cannot be used: {why}; {do}") from None
    # tarfile takes damage after the first member for the end of the archive; a whole one ends in a block of zeros
    file.seek(end)
    block = file.read(512)
    if len(block) < 512 or any(block):
        found = "the file ends too early" if len(block) < 512 else f"byte {end} starts no member"
        raise UserError(
            f"asked for the shard {shard}, found a broken archive: {found} ({size} bytes, {members} members read); "
            "copy or make it again, or leave it out"
        )
    rows = [(key, row) for key, row in places.items() if row[0][0] >= 0]
    place = np.array([row for _, row in rows], dtype=np.int64).reshape(-1, len(FIELDS), 2)
    return TarIndex(tuple(key for key, _ in rows), place)


def field_of(extension: str) -> str | None:
    """The field of a Record that a member with this extension (after the base name's first dot) fills."""
    extension = extension.lower()
    if extension in LABEL_MAPS:
        return "label_map"
    if is_image("x." + extension):
        return "image"
    return {"txt": "text", "json": "regions"}.get(extension)
