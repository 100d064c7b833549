"""Shards behind URLs (s3://, gs://, https://, ...), by way of fsspec."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

from locfast.data.sources.shard_names import braces, shards_among
from locfast.data.sources.tar_index import VERSION, TarIndex, cached_index_path, kept, scan, write
from locfast.errors import UserError, suggest

PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs",
    "abfs": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko", "oci": "ocifs", "hdfs": "pyarrow",
}  # fmt: skip
"""What fsspec needs for a protocol; it has the others itself, or tells."""
STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "md5Hash", "crc32c",
          "generation", "VersionId", "content_md5", "blob_id", "lfs")  # fmt: skip
"""Names under which filesystems tell what changes with a file's content."""
SCANNED = 8 << 20
"""Bytes a request while a shard is scanned: its headers lie between the images, so all of it comes over."""


def is_url(spec: str) -> bool:
    return "://" in spec


def find_urls(spec: str) -> list[str]:
    """URLs of the shards that `spec` names: braces, a glob, a folder of shards, or one. Raises UserError for others."""
    fs = filesystem(spec)
    urls: list[str] = []
    for one in braces(spec):
        # ? in an https address begins its query
        if any(c in one for c in ("*[" if one.startswith("http") else "*[?")):
            found = sorted(_ask(spec, lambda one=one: fs.glob(one)))
            if not found:
                raise UserError(f"asked for the shards {spec}, found nothing that fits {one}; check the pattern")
            urls += map(fs.unstrip_protocol, found)
        elif one.partition("?")[0].endswith(".tar"):
            urls.append(one)
        else:
            listed = _ask(spec, lambda one=one: fs.ls(one, detail=False) if fs.isdir(one) else [])
            paths = {path.rstrip("/").rpartition("/")[2]: path for path in listed}
            shards = [fs.unstrip_protocol(paths[name]) for name in shards_among(paths)]
            if not shards:
                raise UserError(
                    f"asked for the data {spec}, found no tar shard there; a URL must name one (…/one.tar), a pattern "
                    "(…/shard-{000..012}.tar) or a folder of them: copy single images and file lists to a disk first"
                )
            urls += shards
    return urls


def filesystem(url: str) -> Any:
    """fsspec's filesystem for a URL, for this process. UserError for an unknown protocol or a missing package."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url)[0]
    except ImportError as error:
        what = f"`pip install {PACKAGES[protocol]}`" if protocol in PACKAGES else "install what it names"
        raise UserError(f"asked for the data {url}, which needs another package ({error}); {what}") from None
    except ValueError as error:
        near = suggest(protocol, known_implementations)
        raise UserError(
            f"asked for the data {url}, found no way to read {protocol}:// ({error}){near or '; check the address'}"
        ) from None
    except Exception as error:
        raise _unreachable(url, error) from None


class Web:
    """Shards by URL, one request a sample, those of a job at once. Indexes are kept in this machine's cache folder.

    fsspec's filesystems hold a thread and connections, which a fork does not bring along: every process makes its own.
    """

    can_look_ahead = False
    is_waited_for = True

    def __init__(self, url: str) -> None:
        self.url, self._fs, self._pid = url, filesystem(url), os.getpid()

    @property
    def fs(self) -> Any:
        if self._pid != os.getpid():
            self._fs, self._pid = filesystem(self.url), os.getpid()
        return self._fs

    def look(self, shard: str) -> tuple[int, TarIndex | None]:
        stamp = self._stamp(shard)
        return int(stamp[1]), kept(cached_index_path(shard), stamp)

    def index(self, shard: str) -> TarIndex:
        stamp = self._stamp(shard)

        def whole() -> TarIndex:
            with self.fs.open(shard, "rb", block_size=SCANNED, cache_type="readahead") as file:
                return scan(shard, file, int(stamp[1]))

        index = _ask(shard, whole)
        write(cached_index_path(shard), index, stamp)
        return index

    def read(self, shard: str, offset: int, size: int) -> bytes:
        if not size:  # an empty range means another thing to some servers
            return b""
        data = self.fs.cat_file(shard, start=offset, end=offset + size)
        if len(data) != size:
            raise OSError(
                f"asked for {size} bytes, got {len(data)}: the shard was changed, or its server gives no byte ranges"
            )
        return data

    def will_need(self, shard: str, offset: int, size: int) -> None:
        raise NotImplementedError("no filesystem of fsspec reads in the background")

    def _stamp(self, shard: str) -> np.ndarray:
        info = _ask(shard, lambda: self.fs.info(shard))
        if info.get("type") == "directory" or info.get("size") is None:
            found = "a folder" if info.get("type") == "directory" else "a file whose size its server does not tell"
            raise UserError(f"asked for the shard {shard}, found {found}; a shard is a .tar file of known size")
        told = repr([(name, str(info[name])) for name in STAMPS if name in info])
        return np.array([VERSION, info["size"], int(hashlib.sha256(told.encode()).hexdigest()[:15], 16)])

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_fs": None, "_pid": 0}


def _ask(url: str, work: Any) -> Any:
    """What a filesystem answers, or a UserError: each of them raises exceptions of its own."""
    try:
        return work()
    except UserError:
        raise
    except Exception as error:
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: Exception) -> UserError:
    why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return UserError(
        f"asked for {url}, which cannot be read ({why}); check the address, and the credentials in the environment or "
        "in fsspec's config file (~/.config/fsspec)"
    )
