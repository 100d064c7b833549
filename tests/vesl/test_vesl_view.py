"""The page of pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from locfast.data.regions.shards import write_shard
from locfast.data.spec import Record, Region
from locfast.vesl.commands.page import Picture, labels_page
from locfast.vesl.pixels import whole
from tests.vesl.conftest import jpeg


@pytest.fixture
def shards(tmp_path) -> Path:
    boxes = (Region((1, 2, 30, 40), "a <b>red</b> dog", 0.9), Region((5, 5, 20, 20), "the sky", 0.15))
    records = [
        (f"{i:03}", "jpg", Record(jpeg(i), texts=("a caption & more",), regions=boxes[: i % 3])) for i in range(9)
    ]
    write_shard(tmp_path / "run/shards/000000.tar", records)
    return tmp_path / "run/shards"


def test_a_page_shows_every_box_with_its_phrase_and_score(tmp_path, shards, vesl) -> None:
    assert vesl("view", shards, "--out", tmp_path / "page.html", "--count", 9)[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<image ") == 9 and page.count('class="mark"') == 3 * (0 + 1 + 2)
    assert 'aria-label="a &lt;b&gt;red&lt;/b&gt; dog, 0.90"' in page and "<b>red</b>" not in page
    assert '<rect x="1.0" y="2.0" width="29.0" height="38.0" fill="transparent" stroke="#ff4f8b"' in page
    assert '<rect x="5.0" y="5.0" width="15.0" height="15.0" fill="transparent" stroke="#5ab4ff"' in page
    assert "a caption &amp; more" in page


def test_a_page_loads_nothing(tmp_path, shards, vesl) -> None:
    assert vesl("view", shards, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "default-src 'none'" in page and not re.search(r"(src|href)=\"(?!data:)", page)


def test_pictures_are_evenly_spread(tmp_path, shards, vesl) -> None:
    assert vesl("view", shards, "--out", tmp_path / "page.html", "--count", 4)[0] == 0
    named = re.findall(r"000000\.tar/(\d+): ", (tmp_path / "page.html").read_text())
    assert named == ["000", "002", "004", "006"]


def test_a_page_is_not_overwritten_and_a_source_without_regions_is_refused(tmp_path, shards, vesl) -> None:
    (tmp_path / "page.html").write_text("mine")
    code, told = vesl("view", shards, "--out", tmp_path / "page.html")
    assert code == 2 and "--overwrite" in told and (tmp_path / "page.html").read_text() == "mine"
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(jpeg(1))
    code, told = vesl("view", tmp_path / "images", "--out", tmp_path / "other.html")
    assert code == 2 and "has a region" in told


def test_a_runs_folder_is_taken_for_its_shards(tmp_path, shards, vesl) -> None:
    (shards.parent / "vesl.json").write_text("{}")
    assert vesl("view", shards.parent, "--out", tmp_path / "page.html")[0] == 0
    assert vesl("view", shards, "--out", tmp_path / "same.html")[0] == 0
    assert (tmp_path / "page.html").read_text() == (tmp_path / "same.html").read_text()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/vesl.json").write_text("{}")
    code, told = vesl("view", tmp_path / "begun", "--out", tmp_path / "other.html")
    assert code == 2 and "no shard was made there yet" in told


@pytest.mark.parametrize("text", ["a red dog and " * 50, "x" * 700])
def test_a_long_caption_is_folded_and_there_as_a_whole(text: str) -> None:
    picture = Picture("one", whole(jpeg(1)), (text, "short"), ())
    page = labels_page("Labels", "somewhere", [picture], 1)
    beginning = re.search(r"<figcaption><details><summary>([^<]+) \.\.\.</summary>", page)
    assert beginning and text.startswith(beginning[1]) and 100 < len(beginning[1]) <= 200
    assert page.count(text.strip()) == 1 and "<p>short</p>" in page
