"""Images with texts: JSON Lines, text files beside images, and members of shards."""

import json
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch

from locfast.data.loader import Loader
from locfast.data.sources import ImageFolder, JsonLines, hold_out, open_source
from locfast.data.spec import ImageSpec, Record, View
from locfast.errors import UserError

SPEC = ImageSpec({"image": View((16, 16), (0.5,) * 3, (0.5,) * 3)}, text=True, records=True)


def write(path, *lines) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def pairs(root, count: int) -> str:
    return write(root / "pairs.jsonl", *({"image": f"{i:03}.jpg", "text": f"picture {i}"} for i in range(count)))


def texts(source) -> list[tuple[str, ...]]:
    return [source.read(i).texts for i in range(len(source))]


def test_a_line_is_an_image_and_its_captions(folder):
    root = folder(3)
    lines = (
        {"image": "002.jpg", "text": "ein Bär", "width": 40},
        "",
        {"image": str(root / "000.jpg"), "text": ["one", " two ", ""]},
        {"image": "001.jpg"},
    )
    source = open_source(write(root / "pairs.jsonl", *lines))
    assert isinstance(source, JsonLines)
    assert [os.path.basename(source.name(i)) for i in range(3)] == ["002.jpg", "000.jpg", "001.jpg"]
    assert source.read(0) == Record((root / "002.jpg").read_bytes(), str(root / "002.jpg"), texts=("ein Bär",))
    assert [(source.read(i).text, source.read(i).texts) for i in range(3)] == [
        ("ein Bär", ("ein Bär",)),
        ("one", ("one", "two")),
        (None, ()),
    ]
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)
    for index in (3, -1):
        with pytest.raises(IndexError):
            source.read(index)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"image": "000.jpg", "text": "a"', "found line 2 wrong: no JSON ("),
        ("[" * 100_000, "found line 2 wrong: no JSON ("),
        ('{"image": "\\ud800.jpg", "text": "a"}', "found line 2 wrong: half of a surrogate pair"),
        ('{"image": "000.jpg", "text": "a \\ud83d"}', "found line 2 wrong: half of a surrogate pair"),
        ('["000.jpg", "a"]', 'no object but ["000.jpg", "a"]'),
        ('{"file": "000.jpg", "text": "a"}', 'no "image" among its keys (file, text)'),
        ('{"image": 7, "text": "a"}', '"image" is 7'),
        ('{"image": "", "text": "a"}', '"image" is ""'),
        ('{"image": "000.jpg", "text": 7}', '"text" holds 7, which is no string'),
        ('{"image": "000.jpg", "text": ["a", null]}', '"text" holds null, which is no string'),
    ],
)
def test_a_bad_line_is_told_with_file_and_number(folder, line, told):
    file = write(folder(1) / "pairs.jsonl", {"image": "000.jpg", "text": "fine"}, line)
    with pytest.raises(UserError) as error:
        open_source(file)
    assert told in str(error.value) and "line 2" in str(error.value) and file in str(error.value)


def test_mistakes_are_told_apart(folder, tmp_path):
    def refused(*lines) -> str:
        with pytest.raises(UserError) as error:
            open_source(write(root / "pairs.jsonl", *lines))
        return str(error.value)

    root = folder(1)
    assert "no line in it" in refused("", " ")
    assert "1 images in it, but no text" in refused({"image": "000.jpg", "caption": "a"})
    assert "relative to the file's own folder" in refused({"image": "gone.jpg", "text": "a"})
    (root / "pairs.jsonl").write_bytes(b'{"image": "\xff\xfe"}')
    with pytest.raises(UserError, match="not UTF-8"):
        open_source(str(root / "pairs.jsonl"))


def test_a_bad_line_ends_a_command_with_code_2(folder):
    file = write(folder(1) / "pairs.jsonl", {"image": "000.jpg", "text": "fine"}, "nonsense")
    asked = [sys.executable, "-m", "locfast.data", "stats", file, "--workers", "0"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "line 2" in done.stderr and "Traceback" not in done.stderr


def test_pairs_are_held_out_and_looked_at_like_other_images(folder, capsys):
    root = folder(40)
    source = open_source(pairs(root, 40))
    train, held = hold_out(source, share=0.1)
    assert (len(train), len(held)) == (36, 4)
    assert sorted(texts(train) + texts(held)) == sorted(texts(source))
    assert {os.path.basename(held.name(i)) for i in range(4)} == {
        os.path.basename(name) for name in (hold_out(ImageFolder(root), share=0.1)[1].name(i) for i in range(4))
    }
    asked = [sys.executable, "-m", "locfast.data", "stats", str(root / "pairs.jsonl"), "--workers", "0"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "with text: 40" in done.stdout


def test_a_text_file_beside_an_image_holds_a_caption_a_line(folder):
    root = folder(3)
    (root / "sub").mkdir()
    (root / "001.jpg").rename(root / "sub" / "b.c.jpg")
    (root / "000.txt").write_text("a dog\n\n  a wet dog \n")
    (root / "sub" / "b.c.txt").write_text("a cat", encoding="utf-8")
    source = open_source(str(root))
    assert isinstance(source, ImageFolder)
    assert texts(source) == [("a dog", "a wet dog"), (), ("a cat",)]
    (root / "000.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(OSError, match="its text is not UTF-8"):
        source.read(0)


def test_a_folder_without_text_files_looks_for_none(folder, monkeypatch):
    source = open_source(str(folder(2)))
    monkeypatch.setattr("locfast.data.sources.folder.text_beside", lambda name: 1 / 0)
    assert texts(source) == [(), ()]


def test_shards_hold_a_caption_a_line(tmp_path, jpeg, write_tar):
    members = {"0.jpg": jpeg(), "0.txt": b"a dog\na wet dog\n", "1.jpg": jpeg(), "1.txt": b"a cat", "2.jpg": jpeg()}
    source = open_source(str(write_tar(tmp_path / "s.tar", members)))
    assert texts(source) == [("a dog", "a wet dog"), ("a cat",), ()]
    assert source.read(0).text == "a dog\na wet dog\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_without_a_text_is_replaced_counted_and_named_once(folder, caplog, workers):
    root = folder(20)
    lines = [{"image": f"{i:03}.jpg", "text": " " if i == 3 else f"picture {i}"} for i in range(20)]
    del lines[11]["text"]
    source = open_source(write(root / "pairs.jsonl", *lines))
    loader = Loader(source, SPEC, seed=0, workers=workers)
    with caplog.at_level(logging.WARNING, "locfast"):
        batches = list(loader.batches(torch.arange(k * 10, k * 10 + 10) for k in range(4)))
    for batch in batches:
        assert [record.text for record in batch["records"]] == [f"picture {i}" for i in batch["index"].tolist()]
    assert loader.replaced.names == dict.fromkeys([str(root / "003.jpg"), str(root / "011.jpg")], "it has no text")
    assert loader.replaced.count == 4  # two epochs
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
        f"cannot read {root / name} (it has no text)" for name in ("003.jpg", "011.jpg")
    ]


def test_a_source_without_any_text_is_a_mistake_where_texts_are_needed(folder):
    with pytest.raises(UserError, match="it has no text"):
        next(Loader(ImageFolder(folder(3)), SPEC, seed=0, workers=0).batches([torch.arange(2)]))


def test_who_needs_no_text_misses_none(folder):
    loader = Loader(ImageFolder(folder(3)), ImageSpec(SPEC.views), seed=0, workers=0)
    next(loader.batches([torch.arange(3)]))
    assert loader.replaced.count == 0
