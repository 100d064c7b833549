"""Tar shards: random access through an index, the same samples as a folder, broken archives told apart."""

import json
import os
import pickle
import tarfile
import time

import pytest
import torch

from locfast.data.loader import Loader
from locfast.data.order import BlockOrder, arrange
from locfast.data.reader import explain
from locfast.data.regions.shards import write_shard
from locfast.data.sources import TarShards, open_source
from locfast.data.sources.ahead import Ahead
from locfast.data.sources.indexing import index_all, load_indexes
from locfast.data.sources.shard_names import expand
from locfast.data.sources.stores import Disk
from locfast.data.sources.tar_index import cached_index_path, index_path
from locfast.data.spec import ImageSpec, Record, Region, View
from locfast.errors import UserError


def refused(spec) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(spec))
    return str(error.value)


@pytest.fixture
def shards(tmp_path, folder, write_tar):
    """The 20 images of a folder in 4 shards of 5, and that folder."""
    root, out = folder(20), tmp_path / "shards"
    out.mkdir()
    files = sorted(root.iterdir())
    for i in range(4):
        members = {f"{file.stem}.jpg": file.read_bytes() for file in files[5 * i : 5 * i + 5]}
        write_tar(out / f"shard-{i:03}.tar", members)
    return root, out


@pytest.mark.parametrize("spec", ["", "/shard-{000..003}.tar", "/*.tar", "/shard-00{0,1,2,3}.tar"])
def test_shards_hold_the_bytes_of_the_folder(shards, spec):
    root, out = shards
    folder, tar = open_source(str(root)), open_source(f"{out}{spec}")
    assert isinstance(tar, TarShards)
    assert len(tar) == len(folder) == 20
    for i in (19, 0, 7, 5, 4):
        assert tar.read(i).image == folder.read(i).image
    assert tar.name(6) == f"{out}/shard-001.tar/006"


def test_one_shard_is_a_source(shards):
    assert len(open_source(f"{shards[1]}/shard-002.tar")) == 5


def test_members_of_a_key_are_one_sample(tmp_path, jpeg, write_tar):
    regions, cat = [{"box": [1, 2, 3, 4], "text": "a cat"}], Region((1.0, 2.0, 3.0, 4.0), "a cat")
    members = {
        "train/000.txt": "ein Bär".encode(),
        "train/000.jpg": jpeg(seed=0),
        "train/000.json": json.dumps(regions).encode(),
        "train/000.cls": b"7",
        "train/000.seg.png": b"map",
        "train/001.photo.jpg": jpeg(seed=2),
        "train/001.JPG": jpeg(seed=1),
        "train/002.txt": b"a text without an image",
        "val/000.png": jpeg(seed=3),
        "__MACOSX/._000.jpg": b"junk",
    }
    source = TarShards([write_tar(tmp_path / "a.tar", members)])
    assert [source.name(i).split(".tar/")[1] for i in range(len(source))] == ["train/000", "train/001", "val/000"]
    first, second, third = (source.read(i) for i in range(3))
    assert (first.image, first.text, first.regions, first.label_map) == (jpeg(seed=0), "ein Bär", (cat,), b"map")
    assert (second.image, second.text, second.regions, second.label_map) == (jpeg(seed=1), None, None, None)
    assert third.image == jpeg(seed=3)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_either_tar_format_are_read(tmp_path, jpeg, format):
    name = "folder/" + "x" * 180 + "ü.jpg"
    (tmp_path / "image.jpg").write_bytes(jpeg())
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.add(tmp_path / "image.jpg", arcname=name)
    source = TarShards([tmp_path / "a.tar"])
    assert source.name(0).endswith("xü")
    assert source.read(0).image == jpeg()


def test_the_index_lies_beside_its_shard_and_is_used(shards):
    _, out = shards
    open_source(str(out))
    index = index_path(out / "shard-000.tar")
    assert index.is_file()
    before = index.stat().st_mtime_ns
    assert len(open_source(str(out))) == 20
    assert index.stat().st_mtime_ns == before
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


def test_a_shard_that_changed_is_indexed_again(shards, jpeg, write_tar):
    _, out = shards
    open_source(str(out))
    write_tar(out / "shard-000.tar", {"new.jpg": jpeg(90, 90, 5)})
    source = open_source(str(out))
    assert len(source) == 16
    assert source.read(0).image == jpeg(90, 90, 5)


@pytest.mark.parametrize("spoilt", [b"", b"nonsense", b"PK\x03\x04 half a zip"])
def test_a_damaged_index_is_made_again(shards, spoilt):
    _, out = shards
    open_source(str(out))
    index_path(out / "shard-000.tar").write_bytes(spoilt)
    assert len(open_source(str(out))) == 20
    assert index_path(out / "shard-000.tar").stat().st_size > 100


def test_where_a_shards_folder_takes_no_file_the_index_goes_to_the_cache(shards, tmp_path, monkeypatch):
    """A folder in the place of the index file refuses it as a read-only folder would, also for root."""
    _, out = shards
    shard = out / "shard-000.tar"
    index_path(shard).mkdir()
    monkeypatch.setenv("LOCFAST_CACHE", str(tmp_path / "cache"))
    assert len(open_source(str(shard))) == 5
    assert cached_index_path(str(shard)).is_file()
    assert cached_index_path(str(shard)).is_relative_to(tmp_path / "cache")
    assert len(open_source(str(shard))) == 5


def test_many_shards_are_read_with_few_open_files(tmp_path, jpeg, write_tar, monkeypatch):
    monkeypatch.setattr("locfast.data.sources.stores.OPEN_SHARDS", 3)
    source = TarShards([write_tar(tmp_path / f"{i}.tar", {"a.jpg": jpeg(seed=i)}) for i in range(8)])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for i in range(8):
            assert source.read(i).image == jpeg(seed=i)
    assert len(os.listdir("/proc/self/fd")) - before <= 3


def test_a_pickled_source_opens_its_shards_itself(shards):
    source = open_source(str(shards[1]))
    image = source.read(3).image
    assert pickle.loads(pickle.dumps(source)).read(3).image == image


def test_patterns_name_every_shard():
    assert [str(p) for p in expand("a/s-{08..11}.tar")] == [f"a/s-{i}.tar" for i in ("08", "09", "10", "11")]
    assert [str(p) for p in expand("{x,y}-{1..2}.tar")] == ["x-1.tar", "x-2.tar", "y-1.tar", "y-2.tar"]


def test_mistakes_are_told_apart(shards, tmp_path, write_tar):
    _, out = shards
    assert "cannot be opened" in refused(f"{out}/shard-{{000..004}}.tar")
    assert "no file that fits" in refused(f"{out}/other-*.tar")
    assert "runs down" in refused(f"{out}/shard-{{003..000}}.tar")
    assert "neither a range nor a choice" in refused(f"{out}/shard-{{000-003}}.tar")
    assert "without its partner" in refused(f"{out}/shard-{{000..003.tar")
    assert "no image in any" in refused(write_tar(tmp_path / "text.tar", {"a.txt": b"text"}))
    assert "compressed" in refused(write_tar(tmp_path / "packed.tar", {"a.txt": b"text"}, "w:gz"))
    (tmp_path / "no.tar").write_bytes(b"this is no archive" * 100)
    assert "no tar archive" in refused(tmp_path / "no.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    assert "empty.tar" in refused(tmp_path / "empty.tar")


@pytest.mark.parametrize("where", ["in the first header", "in a header", "in an image", "behind the last image"])
def test_a_truncated_shard_is_refused(shards, where):
    shard = shards[1] / "shard-000.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    end = (members[4].offset_data + members[4].size + 511) // 512 * 512
    cuts = (100, members[3].offset + 100, members[3].offset_data + 300, end)
    names = ("in the first header", "in a header", "in an image", "behind the last image")
    os.truncate(shard, dict(zip(names, cuts, strict=True))[where])
    message = refused(shard)
    assert "broken archive" in message or "no tar archive" in message


def test_damage_in_the_middle_of_a_shard_is_refused(shards):
    shard = shards[1] / "shard-000.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[2].offset
    with open(shard, "r+b") as file:
        file.seek(third)
        file.write(b"\xaa" * 512)
    assert f"byte {third} starts no member" in refused(shard)


def test_members_far_apart_are_read_one_by_one_and_close_ones_at_once(tmp_path, jpeg, write_tar):
    far = {"a.jpg": jpeg(seed=1), "b.jpg": b"x" * 200_000, "a.txt": b"a", "c.txt": b"c", "c.jpg": jpeg(seed=2)}
    source = TarShards([write_tar(tmp_path / "a.tar", far)])
    pieces, read = [], source.store.read
    source.store.read = lambda *where: pieces.append(where) or read(*where)
    first, last = source.read(0), source.read(2)
    assert (first.image, first.text, last.image, last.text) == (jpeg(seed=1), "a", jpeg(seed=2), "c")
    assert len(pieces) == 3


def unreadable(source, index) -> str:
    with pytest.raises(OSError) as error:
        source.read(index)
    return explain(error.value)


@pytest.mark.parametrize(
    ("member", "data", "told"),
    [
        ("a.json", b'[{"box": ', "regions cannot be used"),
        ("a.json", b'[{"box": [1, 2, 3], "text": "a cat"}]', "region 0 is [1, 2, 3]"),
        ("a.json", b'[{"box": [1, 2, 3, 4], "text": null}]', "region 0 is null"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.json", b"\xff", "UTF-8"),
    ],
)
def test_a_broken_member_makes_its_sample_unreadable(tmp_path, jpeg, write_tar, member, data, told):
    source = TarShards([write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(), member: data, "b.jpg": jpeg()})])
    assert told in unreadable(source, 0)
    assert source.read(1).image == jpeg()


@pytest.mark.parametrize(
    "data",
    [b'{"width": 40, "sha256": "aa"}', b"null", b"5", b'["tag", "another"]', b'{"regions": [{"bbox": [1, 2, 3, 4]}]}'],
)
def test_a_json_member_that_speaks_of_other_things_has_no_regions(tmp_path, jpeg, write_tar, data):
    source = TarShards([write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(), "a.json": data})])
    assert source.read(0).regions is None


def test_a_written_shard_reads_back_and_has_the_same_bytes_again(tmp_path, jpeg):
    cat = Region((0.5, 1.0, 30.25, 20.0), "a cat", 0.75)
    records = [
        ("000", "jpg", Record(jpeg(seed=0), texts=("ein Bär", "a bear"), regions=(cat,))),
        ("001", "png", Record(jpeg(seed=1), regions=())),
        ("002", "jpg", Record(jpeg(seed=2))),
    ]
    for name in ("one.tar", "two.tar"):
        assert write_shard(tmp_path / name, records) == 3
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    source = TarShards([tmp_path / "one.tar"])
    found = [(one.image, one.texts, one.regions) for one in map(source.read, range(len(source)))]
    assert found == [(record.image, record.texts, record.regions) for _, _, record in records]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.tar", "one.tar.index.npz", "two.tar"]


def test_a_shard_whose_writing_fails_is_not_there(tmp_path):
    def records():
        yield "000", "jpg", Record(b"image")
        raise OSError("no more images")

    with pytest.raises(OSError, match="no more"):
        write_shard(tmp_path / "one.tar", records())
    assert not list(tmp_path.iterdir())


def test_a_shard_that_was_removed_or_shortened_makes_its_samples_unreadable(shards):
    _, out = shards
    source = open_source(str(out))
    (out / "shard-001.tar").unlink()
    os.truncate(out / "shard-002.tar", 1024)
    assert unreadable(source, 5) == "No such file or directory"
    assert "ends" in unreadable(source, 14) and "bytes too early" in unreadable(source, 14)
    assert source.read(19).image


def test_the_loader_replaces_what_a_shard_lost_under_it(shards, caplog):
    _, out = shards
    source = open_source(str(out))
    (out / "shard-001.tar").unlink()
    os.truncate(out / "shard-002.tar", 1024)
    view = View((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    loader = Loader(source, ImageSpec({"image": view}), seed=0, workers=1)
    (batch,) = loader.batches([torch.arange(20)])
    assert all(index < 5 or index >= 15 for index in batch["index"].tolist())
    assert loader.replaced.count >= 10
    assert "shard-001.tar/005 (No such file or directory)" in caplog.text
    assert "shard-002.tar/014 (OSError: the shard ends" in caplog.text


def test_a_shard_asks_the_kernel_for_the_bytes_of_a_block(shards, monkeypatch):
    """Blocks of two samples in shards of five: each is asked for once, from its first byte to its last."""
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, how: asked.append((start, start + size, how)))
    source = open_source(str(shards[1]))
    order = BlockOrder(20, 0, source.groups(), block=2)
    ordered = Ahead(source, order.starts)
    assert order.starts.tolist() == [0, 2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19]
    assert [ordered.read(i).image for i in range(20)] == [source.read(i).image for i in range(20)]
    with tarfile.open(shards[1] / "shard-000.tar") as tar:
        members = tar.getmembers()
    ends = [(m.offset_data, m.offset_data + m.size) for m in members]
    wanted = [(ends[0][0], ends[1][1]), (ends[2][0], ends[3][1]), ends[4]]
    assert [one[:2] for one in asked[:3]] == wanted
    assert len(asked) == 12
    assert {one[2] for one in asked} == {os.POSIX_FADV_WILLNEED}


def test_only_blocks_are_read_ahead(shards, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *where: asked.append(where))
    source = open_source(str(shards[1]))
    for shuffle, wanted in (("full", 0), ("blocks", 4)):
        ordered, order = arrange(source, 0, shuffle)
        for index in order(torch.arange(20))[1].tolist():
            ordered.read(index)
        assert len(asked) == wanted


def test_the_loader_has_the_next_buffer_fetched_while_workers_read_this_one(shards, monkeypatch):
    """Asked for in this process, which reads no sample of them: eight samples in blocks of two, a buffer ahead."""
    monkeypatch.setattr("locfast.data.order.BlockOrder.__init__.__kwdefaults__", {"block": 2, "buffer": 8})
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *where: asked.append(where))
    view = View((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    loader = Loader(open_source(str(shards[1])), ImageSpec({"image": view}), seed=0, workers=1)
    assert len(list(loader.batches(torch.arange(20).split(5)))) == 4
    deadline = time.monotonic() + 10
    while len(asked) < len(loader.order.due(8, 28)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(asked) == len(loader.order.due(8, 28)) > 10


def test_an_empty_shard_between_others_is_no_group(tmp_path, jpeg, write_tar):
    tars = [write_tar(tmp_path / f"{i}.tar", {"a.jpg": jpeg()} if i in (1, 3) else {}) for i in range(5)]
    assert TarShards(tars).groups().tolist() == [0, 1]


def test_processes_index_as_this_one_does(shards, monkeypatch):
    _, out = shards
    paths = [str(path) for path in sorted(out.glob("*.tar"))]
    here = dict(index_all(paths, Disk(), workers=1))
    for path in out.glob("*.npz"):
        path.unlink()
    monkeypatch.setattr("locfast.data.sources.indexing.WORTH_A_FORK", 0)
    there = load_indexes(paths, Disk())
    assert len(list(out.glob("*.npz"))) == 4
    for number, index in enumerate(there):
        assert index.keys == here[number].keys
        assert (index.place == here[number].place).all()


def test_one_broken_shard_does_not_keep_the_others_from_being_indexed(shards):
    _, out = shards
    (out / "shard-001.tar").write_bytes(b"no archive" * 100)
    paths = [str(path) for path in sorted(out.glob("*.tar"))]
    found = dict(index_all(paths, Disk(), workers=2))
    assert [number for number, index in found.items() if isinstance(index, UserError)] == [1]
    assert len(list(out.glob("*.npz"))) == 3


def test_ranks_begin_with_different_shards(shards, monkeypatch):
    """What one rank has indexed is not scanned again by the others."""
    _, out = shards
    paths = [str(path) for path in sorted(out.glob("*.tar"))]
    scanned = []
    make = Disk.index
    monkeypatch.setattr(Disk, "index", lambda self, shard: scanned.append(shard) or make(self, shard))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    other = index_all(paths, Disk(), workers=1)
    assert [next(other)[0], next(other)[0]] == [2, 3]
    monkeypatch.setenv("RANK", "0")
    assert [number for number, _ in index_all(paths, Disk(), workers=1)] == [2, 3, 0, 1]
    assert [number for number, _ in other] == [0, 1]
    assert sorted(scanned) == paths


def test_a_size_that_no_offset_holds_is_a_broken_shard(tmp_path):
    member = tarfile.TarInfo("0.jpg")
    member.size = 2**70
    (tmp_path / "broken.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UserError, match=r"broken\.tar.*cannot be used"):
        TarShards([tmp_path / "broken.tar"])
