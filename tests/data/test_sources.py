"""Folders, lists and splits; every mistake gets one clear message."""

import os
import pickle
import tracemalloc

import pytest

from locfast.data.sources import FileList, ImageFolder, LabelledFolder, hold_out, open_source
from locfast.data.sources.names import Names
from locfast.errors import UserError


def names(source) -> list[str]:
    return [os.path.basename(source.name(i)) for i in range(len(source))]


def refused(spec) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(spec))
    return str(error.value)


def test_a_folder_is_read_at_any_depth_in_the_order_of_its_names(tmp_path, jpeg):
    for path in ("b/2.jpg", "b/deep/er/1.JPEG", "a.png", "c/0.webp"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(jpeg())
    (tmp_path / "b/notes.txt").write_text("no image")
    source = open_source(str(tmp_path))
    assert isinstance(source, ImageFolder)
    assert names(source) == ["a.png", "2.jpg", "1.JPEG", "0.webp"]
    assert source.read(1).image == jpeg()
    assert source.read(1).name == str(tmp_path / "b/2.jpg")


def test_hidden_files_and_folders_are_left_out(tmp_path, jpeg):
    (tmp_path / ".cache").mkdir()
    for path in (".cache/1.jpg", "._2.jpg", "3.jpg"):
        (tmp_path / path).write_bytes(jpeg())
    assert names(open_source(str(tmp_path))) == ["3.jpg"]


def test_symbolic_links_are_followed_but_not_round_in_circles(tmp_path, jpeg):
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    other.mkdir()
    (other / "far.jpg").write_bytes(jpeg())
    (data / "linked").symlink_to(other)
    (data / "near.jpg").symlink_to(other / "far.jpg")
    (data / "linked" / "back").symlink_to(data)
    assert names(ImageFolder(data)) == ["far.jpg", "near.jpg"]


def test_a_source_has_no_sample_outside_of_its_range(folder):
    source = open_source(str(folder(3)))
    for index in (3, -1):
        with pytest.raises(IndexError):
            source.read(index)


def test_a_list_is_relative_to_its_own_folder(tmp_path, folder):
    root = folder(3)
    (root / "some.txt").write_text("002.jpg\n\n  000.jpg  \n" + str(root / "001.jpg") + "\n")
    source = open_source(str(root / "some.txt"))
    assert isinstance(source, FileList)
    assert names(source) == ["002.jpg", "000.jpg", "001.jpg"]
    assert source.read(0).image == (root / "002.jpg").read_bytes()


def test_labelled_folders_pair_images_with_their_maps(tmp_path, jpeg, encode, picture):
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "images" / split / f"{i}.jpg").write_bytes(jpeg(seed=i))
    label_map = encode(picture().convert("L"), "PNG")
    for path in ("train/0.png", "train/2.png", "val/1.png"):
        (tmp_path / "annotations" / path).write_bytes(label_map)
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    source = open_source(str(tmp_path))
    assert isinstance(source, LabelledFolder)
    assert [source.name(i)[-11:] for i in range(3)] == ["train/0.jpg", "train/2.jpg", "es/val/1.jpg"[-11:]]
    assert source.classes == ("sky", "road")
    assert source.read(1).label_map == label_map
    assert names(LabelledFolder(tmp_path, "val")) == ["1.jpg"]
    with pytest.raises(UserError, match="no folder"):
        LabelledFolder(tmp_path, "test")


def test_the_demo_is_a_source():
    assert len(open_source("demo:12")) == 12
    assert open_source("demo", seed=1).read(3).image != open_source("demo", seed=2).read(3).image
    assert "demo:4096" in refused("demo:many")


def test_a_missing_folder_is_named_with_the_nearest_name(tmp_path):
    (tmp_path / "photos").mkdir()
    assert "did you mean 'photos'?" in refused(tmp_path / "fotos")


def test_mistakes_are_told_apart(tmp_path, jpeg):
    (tmp_path / "empty").mkdir()
    assert "empty folder" in refused(tmp_path / "empty")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.md").write_text("text")
    assert "found none" in refused(tmp_path / "words")
    (tmp_path / "one.jpg").write_bytes(jpeg())
    assert "single image" in refused(tmp_path / "one.jpg")
    (tmp_path / "data.zip").write_bytes(b"PK")
    assert "neither .txt nor .tar" in refused(tmp_path / "data.zip")
    (tmp_path / "list.txt").write_text("\n\n")
    assert "no line" in refused(tmp_path / "list.txt")
    (tmp_path / "gone.txt").write_text("a.jpg\nb.jpg\n")
    assert "relative to its own folder" in refused(tmp_path / "gone.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    assert "not UTF-8" in refused(tmp_path / "binary.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_a_mistake_of_the_user(folder):
    root = folder(2)
    root.chmod(0)
    try:
        assert "cannot be read" in refused(root)
    finally:
        root.chmod(0o755)


def test_hold_out_splits_without_overlap_and_always_alike(folder):
    source = open_source(str(folder(40)))
    train, held = hold_out(source, share=0.1)
    assert (len(train), len(held)) == (36, 4)
    assert sorted(names(train) + names(held)) == names(source)
    assert names(train) == sorted(names(train))
    assert names(hold_out(source, count=4)[1]) == names(held)
    assert names(hold_out(source, count=4, seed=1)[1]) != names(held)
    assert train.read(7).name == train.name(7)
    with pytest.raises(IndexError):
        train.read(36)


def test_hold_out_refuses_to_leave_one_side_empty(folder):
    source = open_source(str(folder(3)))
    for count in (0, 3, 4):
        with pytest.raises(UserError, match="leaves none on one side"):
            hold_out(source, count=count)


def test_names_are_the_same_however_many_come_at_a_time(monkeypatch):
    names = [f"ä/{i}" * (i % 3) for i in range(25)]
    for chunk in (1, 7, 25, 100):
        monkeypatch.setattr("locfast.data.sources.names.CHUNK", chunk)
        kept = Names(iter(names))
        assert [kept[i] for i in range(len(kept))] == names
    assert len(Names([])) == 0


def test_making_names_takes_hardly_more_memory_than_keeping_them():
    """Of 200000 names, 0.9 times as much on top, which grows no further; as a list of bytes objects it was 3.5."""
    tracemalloc.start()
    names = Names(f"folder/of/images/{i:013}.jpg" for i in range(200_000))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(names) == 200_000
    assert peak - kept < 1.5 * kept


def test_names_survive_pickling_and_odd_bytes():
    kept = pickle.loads(pickle.dumps(Names(["", "ä/é.jpg", os.fsdecode(b"\xff.jpg")])))
    assert [kept[i] for i in range(3)] == ["", "ä/é.jpg", os.fsdecode(b"\xff.jpg")]
