"""Tar shards of images, captions and regions, as `TarShards` reads them."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from locfast.data.regions.json_form import region_json
from locfast.data.spec import Record


def write_shard(path: Path, records: Iterable[tuple[str, str, Record]]) -> int:
    """Write (key, the image's extension, record) to a shard, aside and then renamed; gives the number of samples.

    KEY.EXT is the image's bytes as they are, KEY.txt a caption a line, KEY.json the regions, where there are any. The
    same records make the same bytes, whoever writes them and when.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    count = 0
    try:
        with os.fdopen(handle, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for key, extension, record in records:
                    _add(tar, f"{key}.{extension}", record.image)
                    if record.texts:
                        _add(tar, f"{key}.txt", "\n".join(record.texts).encode())
                    if record.regions is not None:
                        _add(tar, f"{key}.json", json.dumps(region_json(record.regions)).encode())
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
    return count


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
