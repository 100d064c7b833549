"""Shards by URL: the samples of the files, one request each, in forked workers too; mistakes told in one message."""

from __future__ import annotations

import pickle
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import torch
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from locfast.data.loader import Loader
from locfast.data.sources import TarShards, hold_out, open_source
from locfast.data.sources.tar_index import cached_index_path
from locfast.data.sources.web import Web
from locfast.data.spec import ImageSpec, View
from locfast.errors import UserError

SPEC = ImageSpec({"image": View((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}, records=True)


class Slow(AsyncFileSystem):
    """The memory filesystem behind an event loop, as s3fs and gcsfs are: useless in a process that forked off."""

    protocol = "slow"

    async def _info(self, path, **kwargs):
        return MemoryFileSystem().info(self._strip_protocol(path))

    async def _cat_file(self, path, start=None, end=None, **kwargs):
        return MemoryFileSystem().cat_file(self._strip_protocol(path), start, end)

    def _open(self, path, mode="rb", **kwargs):
        return MemoryFileSystem().open(path, mode)


fsspec.register_implementation("slow", Slow, clobber=True)


@pytest.fixture
def shards(tmp_path, jpeg, write_tar, monkeypatch):
    """Three shards of four samples with a text each, on disk and in memory; indexes go to a cache of the test."""
    monkeypatch.setenv("LOCFAST_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "shards"
    out.mkdir()
    for shard in range(3):
        members = {}
        for i in range(4 * shard, 4 * shard + 4):
            members |= {f"{i:03}.jpg": jpeg(seed=i), f"{i:03}.txt": str(i).encode()}
        write_tar(out / f"s-{shard}.tar", members)
        fsspec.filesystem("memory").pipe_file(f"/bucket/s-{shard}.tar", (out / f"s-{shard}.tar").read_bytes())
    yield out
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def refused(spec: str) -> str:
    with pytest.raises(UserError) as error:
        open_source(spec)
    return str(error.value)


def samples(source) -> list[tuple]:
    return [(source.read(i).image, source.read(i).text) for i in range(len(source))]


@pytest.mark.parametrize("spec", ["", "/", "/s-{0..2}.tar", "/*.tar", "/s-[012].tar"])
@pytest.mark.parametrize("where", ["memory://bucket", "file"])
def test_urls_hold_the_samples_of_the_files(shards, where, spec):
    source = open_source((f"file://{shards}" if where == "file" else where) + spec)
    assert isinstance(source, TarShards)
    assert samples(source) == samples(open_source(str(shards)))
    assert source.name(5).endswith("/s-1.tar/005")
    assert "://" in source.name(5)
    assert source.groups().tolist() == [0, 4, 8]


@pytest.mark.parametrize("protocol", ["memory", "slow", "file"])
def test_forked_workers_read_urls_as_this_process_does(shards, protocol):
    """The parent has read before they fork, so connections and threads are there that a fork would break."""
    where = f"file://{shards}" if protocol == "file" else f"{protocol}://bucket"
    source = open_source(where + "/s-{0..2}.tar")
    assert source.read(3).text == "3"
    positions = [torch.arange(0, 12), torch.arange(12, 24)]
    made = [
        [batch["views"]["image"] for batch in loader.batches(positions)]
        for loader in (Loader(source, SPEC, seed=0, workers=workers) for workers in (0, 2))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_an_index_is_kept_by_url_until_the_file_changes(shards, jpeg, write_tar, tmp_path, monkeypatch):
    url = "memory://bucket/s-0.tar"
    open_source(url)
    assert cached_index_path(url).is_file()
    assert cached_index_path(url).is_relative_to(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("locfast.data.sources.web.scan", None)
        assert len(open_source(url)) == 4
    changed = write_tar(tmp_path / "new.tar", {"n.jpg": jpeg(90, 90, 7)})
    fsspec.filesystem("memory").pipe_file("/bucket/s-0.tar", changed.read_bytes())
    assert samples(open_source(url)) == [(jpeg(90, 90, 7), None)]


def test_a_sample_is_one_request(shards, monkeypatch):
    source = open_source("memory://bucket")
    asked = []
    monkeypatch.setattr(
        MemoryFileSystem,
        "cat_file",
        lambda self, path, start, end, read=MemoryFileSystem.cat_file: (
            asked.append((path, end - start)) or read(self, path, start, end)
        ),
    )
    record = source.read(6)
    assert [path for path, _ in asked] == ["/bucket/s-1.tar"] or len(asked) == 1
    assert asked[0][1] < len(record.image) + 2048
    assert record.text == "6"


def test_a_server_that_sends_the_whole_file_makes_samples_unreadable(shards, monkeypatch):
    source = open_source("memory://bucket")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, start, end: bytes(100_000))
    with pytest.raises(OSError, match="no byte ranges"):
        source.read(0)


def test_a_removed_or_shortened_shard_makes_its_samples_unreadable(shards):
    source, memory = open_source("memory://bucket"), fsspec.filesystem("memory")
    memory.pipe_file("/bucket/s-0.tar", b"")
    memory.rm("/bucket/s-1.tar")
    for index in (3, 4):
        with pytest.raises(OSError):
            source.read(index)
    assert source.read(8).text == "8"


def test_a_source_by_url_survives_pickling(shards):
    source = open_source("memory://bucket")
    assert pickle.loads(pickle.dumps(source)).read(3) == source.read(3)


def test_mistakes_are_told_apart(shards, monkeypatch):
    memory = fsspec.filesystem("memory")
    assert "s-3.tar" in refused("memory://bucket/s-{0..3}.tar")
    assert "nothing that fits" in refused("memory://bucket/other-*.tar")
    assert "runs down" in refused("memory://bucket/s-{2..0}.tar")
    memory.pipe_file("/pictures/a.jpg", b"a picture")
    for other in ("memory://pictures", "memory://pictures/a.jpg", "memory://nothing/here"):
        assert "must name one (…/one.tar), a pattern" in refused(other)
    memory.pipe_file("/bucket/broken.tar", b"no archive" * 100)
    assert "no tar archive" in refused("memory://bucket/broken.tar")
    memory.pipe_file("/bucket/cut.tar", memory.cat_file("/bucket/s-0.tar")[:3000])
    assert "memory://bucket/cut.tar" in refused("memory://bucket/cut.tar")
    assert "did you mean 'memory'" in refused("memoy://bucket/s-0.tar")


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_named(protocol, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})  # fsspec.registry is the name of a dict too
    for module in [name for name in sys.modules if name == "fsspec.implementations.http"]:
        monkeypatch.delitem(sys.modules, module)
    assert f"pip install {package}" in refused(f"{protocol}://bucket/s-{{0..2}}.tar")


class Ranged(SimpleHTTPRequestHandler):
    """Python's file server, with byte ranges."""

    def do_GET(self):
        wanted = self.headers.get("Range")
        if not wanted:
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments):
        pass


def test_shards_of_a_web_server_are_read_by_forked_workers(shards):
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranged, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = open_source(f"http://127.0.0.1:{server.server_port}/s-{{0..2}}.tar")
        assert samples(source) == samples(open_source(str(shards)))
        (batch,) = Loader(source, SPEC, seed=0, workers=2).batches([torch.arange(12)])
        assert sorted(record.text for record in batch["records"]) == sorted(map(str, range(12)))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("workers", [0, 1])
def test_requests_of_a_job_are_under_way_together(shards, monkeypatch, workers):
    """Twelve samples of a server that takes a fifth of a second: 2.4 s one after the other, behind a hold-out too."""
    read = Web.read
    monkeypatch.setattr(Web, "read", lambda self, *place: time.sleep(0.2) or read(self, *place))
    source, _ = hold_out(open_source("memory://bucket/s-{0..2}.tar"), count=1)
    begin = time.perf_counter()
    batch = next(Loader(source, SPEC, seed=0, workers=workers).batches([torch.arange(11)]))
    assert time.perf_counter() - begin < 1.5
    assert sorted(int(record.text) for record in batch["records"]) == sorted({int(r.text) for r in batch["records"]})
    assert len(batch["records"]) == 11


def test_a_request_that_fails_costs_its_own_sample_alone(shards):
    source = open_source("memory://bucket/s-{0..2}.tar")
    whole = fsspec.filesystem("memory").cat_file("/bucket/s-1.tar")
    fsspec.filesystem("memory").pipe_file("/bucket/s-1.tar", whole[:2000])
    loader = Loader(source, SPEC, seed=0, workers=0, shuffle="full")
    batch = next(loader.batches([torch.arange(12)]))
    assert len(batch["records"]) == 12
    assert 0 < len(loader.replaced.names) <= 4
    assert all("s-1.tar" in name for name in loader.replaced.names)
