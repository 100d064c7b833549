"""GRIT: img2dataset's shards become region shards, each by itself, and a run that was stopped goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from convert_files import refused, run

from locfast.data.sources import open_source

CAPTION = "a wire hanger with a paper cover that reads we heart our customers"
CHUNKS = [[19, 32, 0.02, 0.25, 0.96, 0.95, 0.79298526], [0, 13, 0.0, 0.03, 0.95, 1.0, 0.67520964]]
EXPRESSIONS = [[19, 66, *CHUNKS[0][2:]], [0, 66, *CHUNKS[1][2:]]]


def sample(jpeg, key: str, size=(64, 48), **changes) -> dict[str, bytes]:
    """KEY.jpg, KEY.txt and KEY.json as img2dataset writes them, GRIT's rows all numbers of one kind as in parquet."""
    meta = {
        "clip_similarity_vitb32": 0.353271484375,
        "id": 1795296605919,
        "noun_chunks": [list(map(float, row)) for row in CHUNKS],
        "ref_exps": [list(map(float, row)) for row in EXPRESSIONS],
        "caption": CAPTION,
        "url": "https://example.com/customerservice-1.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": size[0],
        "height": size[1],
        "original_width": size[0] * 4 + 1,
        "original_height": size[1] * 4,
        "exif": "{}",
        "sha256": "0" * 64,
    } | changes
    caption = str(meta["caption"]).encode()
    return {f"{key}.jpg": jpeg(*size), f"{key}.json": json.dumps(meta, indent=4).encode(), f"{key}.txt": caption}


@pytest.fixture
def grit(tmp_path, jpeg, write_tar):
    """Two shards with two samples each, and what img2dataset leaves beside a shard."""
    (tmp_path / "grit").mkdir()
    for shard in range(2):
        keys = [f"{shard:05}{i:04}" for i in range(2)]
        write_tar(tmp_path / f"grit/{shard:05}.tar", sample(jpeg, keys[0]) | sample(jpeg, keys[1], (33, 20)))
        (tmp_path / f"grit/{shard:05}_stats.json").write_text("{}")
    return tmp_path


def regions(record) -> list[tuple]:
    return [(region.box, region.text, region.score) for region in record.regions]


def test_phrases_are_cut_from_the_caption_and_boxes_scaled_to_the_image(grit, jpeg, capsys):
    assert run("grit", grit / "grit", "--out", grit / "out") == 0
    source = open_source(str(grit / "out"))
    assert len(source) == 4
    first, second = source.read(0), source.read(1)
    assert first.image == jpeg(64, 48) and first.texts == (CAPTION,)
    paper = "a paper cover that reads we heart our customers"
    assert regions(first) == [
        ((0.02 * 64, 0.25 * 48, 0.96 * 64, 0.95 * 48), paper, 0.79298526),
        ((0.0, 0.03 * 48, 0.95 * 64, 48.0), CAPTION, 0.67520964),
    ]
    assert second.regions[0].box == (0.02 * 33, 0.25 * 20, 0.96 * 33, 0.95 * 20)
    out = capsys.readouterr().out
    assert out.startswith("4 images, 8 regions (2.00 an image), 4 with a caption\n")
    assert out.endswith(f"  python -m locfast.data stats {grit / 'out'}\n")


@pytest.mark.parametrize(("phrases", "texts"), [("noun_chunks", 2), ("both", 4)])
def test_noun_chunks_and_expressions_as_asked(grit, phrases, texts):
    run("grit", grit / "grit/00000.tar", "--out", grit / "out", "--phrases", phrases)
    found = [region.text for region in open_source(str(grit / "out")).read(0).regions]
    assert len(found) == texts and found[-2:] == ["a paper cover", "a wire hanger"]


ROWS = {
    "a phrase that lies outside the caption": [60, 67, 0, 0, 1, 1, 0.9],
    "a row that is not start, end, four edges and a score": [0, 13, 0, 0, 1, 1],
    "a score below 0.5": [0, 13, 0, 0, 1, 1, 0.4],
    "a box without area": [0, 13, 0.5, 0, 0.5, 1, 0.9],
    "a box with swapped corners": [0, 13, 0.5, 0, 0.4, 1, 0.9],
    "a box outside the image": [0, 13, 1.1, 0, 1.2, 1, 0.9],
    "a box or score that is no finite number": [0, 13, float("nan"), 0, 1, 1, 0.9],
}


@pytest.mark.parametrize("reason", ROWS)
def test_a_row_that_cannot_be_used_is_dropped_and_counted(grit, jpeg, write_tar, reason, capsys):
    write_tar(grit / "one.tar", sample(jpeg, "0", ref_exps=[ROWS[reason], [0, 13, 0, 0, 1, 1, 0.9]]))
    run("grit", grit / "one.tar", "--out", grit / "out", "--min-score", 0.5)
    assert regions(open_source(str(grit / "out")).read(0)) == [((0.0, 0.0, 64.0, 48.0), "a wire hanger", 0.9)]
    assert f"  dropped 1 region: {reason}\n" in capsys.readouterr().out


def test_rows_as_text_and_none_at_all_are_read_too(grit, jpeg, write_tar):
    rows = sample(jpeg, "0", ref_exps=json.dumps(EXPRESSIONS)) | sample(jpeg, "1", ref_exps=None)
    write_tar(grit / "one.tar", rows)
    run("grit", grit / "one.tar", "--out", grit / "out")
    source = open_source(str(grit / "out"))
    assert [len(source.read(i).regions) for i in range(2)] == [2, 0]


def test_an_image_that_cannot_be_used_is_dropped_and_counted(grit, jpeg, write_tar, picture, encode, capsys):
    turned = picture(64, 48)
    exif = turned.getexif()
    exif[274] = 6
    samples = {
        "no JSON beside it": {"0.jpg": jpeg()},
        "an image file that cannot be read": sample(jpeg, "1") | {"1.jpg": b"<html>"},
        "JSON that cannot be read": sample(jpeg, "2") | {"2.json": b"{"},
        "no caption, from which the phrases are cut": sample(jpeg, "3", caption=None),
        "boxes that cannot be read": sample(jpeg, "4", ref_exps="[["),
        "turned or mirrored by EXIF, and which way up its boxes lie is not told": sample(jpeg, "5")
        | {"5.jpg": encode(turned, exif=exif)},
        "another shape than the original: it was cropped or padded, and the boxes are of the original": sample(
            jpeg, "6", original_width=100, original_height=100
        ),
    }
    good = sample(jpeg, "7")
    write_tar(grit / "one.tar", {name: data for one in (*samples.values(), good) for name, data in one.items()})
    run("grit", grit / "one.tar", "--out", grit / "out")
    source = open_source(str(grit / "out"))
    assert [source.name(i) for i in range(len(source))] == [f"{grit}/out/one.tar/7"]
    out = capsys.readouterr().out
    for key, reason in enumerate(samples):
        assert f"  dropped 1 image: {reason}, e.g. {grit}/one.tar/{key}\n" in out


def test_resume_keeps_whole_shards_and_makes_the_others_with_the_same_bytes_and_counts(grit, capsys):
    run("grit", grit / "grit", "--out", grit / "out")
    summary = capsys.readouterr().out
    shards = [grit / "out/00000.tar", grit / "out/00001.tar"]
    whole = [shard.read_bytes() for shard in shards]
    shards[1].unlink()
    (grit / "out/.00001.tar-abc.tmp").write_bytes(b"left by a run that was killed")
    kept = shards[0].stat().st_ino
    assert run("grit", grit / "grit", "--out", grit / "out", "--resume") == 0
    assert [shard.read_bytes() for shard in shards] == whole and shards[0].stat().st_ino == kept
    told = capsys.readouterr()
    assert told.out == summary and "1 of 2 shards are there already" in told.err
    assert not list((grit / "out").glob(".*"))


def test_a_run_that_is_killed_goes_on_to_the_shards_of_an_unbroken_one(grit, jpeg, write_tar, capsys):
    for shard in range(8):
        samples = [sample(jpeg, f"{shard:05}{i:04}") for i in range(60)]
        write_tar(grit / f"grit/{shard:05}.tar", {name: data for one in samples for name, data in one.items()})
    run("grit", grit / "grit", "--out", grit / "whole")
    summary = capsys.readouterr().out
    out = grit / "out"
    for receipts in (1, 4):
        command = [sys.executable, "-m", "locfast.data", "convert", "grit", str(grit / "grit"), "--out", str(out)]
        process = subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*.json"))) < receipts:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert run("grit", grit / "grit", "--out", out, "--resume") == 0
    assert capsys.readouterr().out == summary.replace(str(grit / "whole"), str(out))
    for shard in (grit / "whole").glob("*.tar"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()
    assert not list(out.glob(".*"))


def test_a_shard_without_its_receipt_or_of_another_input_is_made_again(grit, jpeg, write_tar):
    run("grit", grit / "grit", "--out", grit / "out")
    (grit / "out/00000.tar").write_bytes(b"half")  # as if its receipt had been made for it, which has another size
    (grit / "out/00001.tar.converted.json").unlink()
    write_tar(grit / "grit/00001.tar", sample(jpeg, "9"))
    run("grit", grit / "grit", "--out", grit / "out", "--resume")
    source = open_source(str(grit / "out"))
    assert [source.name(i).split("/")[-1] for i in range(len(source))] == ["000000000", "000000001", "9"]


def test_processes_make_the_same_shards(grit, capsys):
    run("grit", grit / "grit", "--out", grit / "one")
    run("grit", grit / "grit", "--out", grit / "two", "--workers", 2)
    for name in ("00000.tar", "00001.tar"):
        assert (grit / "one" / name).read_bytes() == (grit / "two" / name).read_bytes()
    assert capsys.readouterr().out.count("4 images, 8 regions") == 2


def test_a_broken_shard_is_named_and_the_others_are_converted(grit, capsys):
    os.truncate(grit / "grit/00001.tar", 1500)
    assert run("grit", grit / "grit", "--out", grit / "out") == 2
    out = capsys.readouterr().out
    assert out.startswith("2 images, 4 regions") and "not converted: asked for the shard" in out
    assert sorted(one.name for one in (grit / "out").glob("*.tar")) == ["00000.tar"]


def test_shards_that_were_downloaded_without_the_boxes_are_told_how_to_get_them(grit, jpeg, write_tar, capsys):
    bare = sample(jpeg, "0")
    meta = json.loads(bare["0.json"])
    del meta["ref_exps"]
    write_tar(grit / "bare.tar", bare | {"0.json": json.dumps(meta).encode()})
    assert run("grit", grit / "bare.tar", "--out", grit / "out") == 2
    told = capsys.readouterr().out
    assert "found no ref_exps in its JSON" in told and "--save_additional_columns" in told
    assert not list((grit / "out").glob("*.tar")) and not list((grit / "out").glob(".*"))


def test_nothing_is_overwritten_or_mixed_unasked(grit, write_tar, jpeg):
    arguments = ("grit", grit / "grit", "--out", grit / "out")
    run(*arguments)
    assert "found 2 of its 2 shards there, e.g. 00000.tar; add --resume" in refused(*arguments)
    assert "--resume and --overwrite; one keeps" in refused(*arguments, "--resume", "--overwrite")
    assert "was converted with {'phrases': 'ref_exps'" in refused(*arguments, "--resume", "--phrases", "both")
    assert run(*arguments, "--overwrite", "--phrases", "both") == 0
    assert len(open_source(str(grit / "out")).read(0).regions) == 4
    write_tar(grit / "out/zzz.tar", sample(jpeg, "0"))
    assert "found the shard zzz.tar there, which is not of this conversion" in refused(*arguments, "--overwrite")


def test_shards_of_one_conversion_may_be_made_in_parts(grit):
    for shard in ("00000.tar", "00001.tar"):
        assert run("grit", grit / "grit" / shard, "--out", grit / "out") == 0
    assert len(open_source(str(grit / "out"))) == 4


@pytest.mark.parametrize(
    ("shards", "out", "message"),
    [
        ("{0}/grit", "{0}/grit", "which holds the shards to convert; name another folder"),
        ("{0}/none", "{0}/out", "found no such file or folder"),
        ("{0}/grit", "{0}/no/out", "make it first: mkdir -p"),
        ("{0}/grit", "{0}/grit/00000.tar", "found a file; shards go into a folder"),
        ("{0}/{{grit,copy}}/00000.tar", "{0}/out", "found two shards of one name"),
        ("https://example.com/{{00000..00009}}.tar", "{0}/out", "lies behind a URL; copy its shards to a disk"),
    ],
)
def test_a_mistake_is_told(grit, shards, out, message):
    (grit / "copy").mkdir()
    (grit / "copy/00000.tar").write_bytes((grit / "grit/00000.tar").read_bytes())
    shards = shards.format(grit) if "{grit" not in shards else f"{grit}/*/00000.tar"
    assert message in refused("grit", shards, "--out", out.format(grit))
