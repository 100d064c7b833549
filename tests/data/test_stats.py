"""`python -m locfast.data stats`: a look at a source from the outside."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from locfast.data.__main__ import main
from locfast.data.commands import stats
from locfast.data.commands.look import look, looks, summary
from locfast.data.sources import ImageFolder
from locfast.errors import UserError


def data(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "locfast.data", *args], capture_output=True, text=True, timeout=120)


def test_damaged_files_are_named_and_make_it_fail(folder, damage, tmp_path):
    root = folder(100)
    bad = damage(root)
    done = data("stats", str(root), "--workers", "2", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 1
    assert "90 can be read, 10 cannot" in done.stdout
    assert all(name in done.stdout for name in bad)
    told = json.loads((tmp_path / "found.json").read_text())
    assert sorted(one["name"] for one in told["broken"]) == sorted(bad)
    assert all(one["reason"] for one in told["broken"])
    assert sum(told["reasons"].values()) == 10 and told["reasons"]["the file is empty"] == 1
    assert told["formats"] == {"JPEG baseline": 90} and told["readable"] == 90


def test_a_missing_source_ends_with_one_message_and_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data", "stats", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="^2$"):
        main()
    told = capsys.readouterr().err
    assert "found no such file or folder" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("typed", [("photos", "--count", "0"), ("--count", "0", "photos")])
def test_a_source_without_a_command_is_told_what_to_type(typed):
    done = data(*typed)
    assert done.returncode == 2
    assert f"type `python -m locfast.data stats {' '.join(typed)}`" in done.stderr


def test_a_mistyped_command_is_told_its_name():
    done = data("stat", "photos")
    assert done.returncode == 2 and "did you mean 'stats'?" in done.stderr


def test_an_unknown_flag_is_refused():
    done = data("stats", "demo", "--cuont", "3")
    assert done.returncode == 2 and "unrecognized arguments: --cuont 3" in done.stderr


def test_every_kind_of_file_is_told(tmp_path, picture, encode):
    turned = picture().getexif()
    turned[0x0112] = 6
    files = {
        "a.jpg": encode(picture(), progressive=True),
        "b.jpg": encode(picture(40, 80), exif=turned),
        "c.jpg": encode(picture().convert("L")),
        "d.jpg": encode(picture().convert("CMYK")),
        "e.png": encode(picture().convert("RGBA"), "PNG"),
        "f.webp": encode(picture(), "WEBP"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    source = ImageFolder(tmp_path)
    told = summary(list(looks(source, len(source), 0)))
    assert told["formats"] == {"JPEG baseline": 3, "JPEG progressive": 1, "PNG": 1, "WEBP": 1}
    assert told["colours"] == {"RGB": 3, "grey": 1, "CMYK": 1, "RGB with transparency": 1}
    assert told["rotated"] == 1
    assert look(source, 1).size == (40, 80)  # stored 80 high, turned upright
    assert told["pixels"]["width"]["max"] == 80 and told["pixels"]["height"]["min"] == 40


def test_processes_find_what_one_process_finds(folder, damage):
    root = folder(100)
    damage(root)
    source = ImageFolder(root)
    assert list(looks(source, 40, 2)) == list(looks(source, 40, 0))


def test_a_process_that_dies_is_told_and_nothing_hangs(folder):
    class Deadly(ImageFolder):
        def read(self, index):
            if index == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(index)

    with pytest.raises(UserError, match="a decoding process died"):
        list(looks(Deadly(folder(20)), 20, 2))


def test_without_a_terminal_lines_tell_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(stats, "EVERY", 0.0)
    with stats.progress(3) as advance:
        for done, broken in ((1, False), (2, True), (3, False)):
            advance(done, broken)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == [f"looked at {k} of 3" for k in (1, 2, 3)]
    assert told[2].endswith("1 broken")


def test_regions_are_counted_and_so_are_those_of_no_use(folder, tmp_path):
    """Reasons are those of the whole image: what a crop loses is no fault of the source."""
    root = folder(4)  # of 40 x 40 and more

    def line(index: int, *regions: tuple[list[float], str]) -> str:
        return json.dumps({"image": f"{index:03}.jpg", "regions": [{"box": b, "text": t} for b, t in regions]})

    good = ([1, 1, 1.5, 1.5], "a crumb")
    lines = [
        line(0, good, ([0, 0, 40, 40], "all"), ([-9, -9, 900, 900], "more")),
        line(1, ([9, 9, 5, 20], "swapped"), ([math.nan, 0, 1, 1], "not finite"), ([5, 5, 5, 9], "empty"), good),
        line(2, ([400, 400, 500, 500], "outside"), ([401, 400, 500, 500], "outside"), ([1, 1, 9, 9], " ")),
        line(3),
        json.dumps({"image": "000.jpg", "text": "nobody looked"}),
    ]
    (root / "a.jsonl").write_text("\n".join(lines))
    done = data("stats", str(root / "a.jsonl"), "--workers", "0", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["regions"] == 4 and told["region"]["count"] == 10
    assert told["region"]["dropped"] == {"outside": 2, "swapped": 1, "not finite": 1, "empty": 1, "no text": 1}
    assert told["region"]["per_image"] | {"p5": 0, "p95": 0} == {"min": 0, "p5": 0, "median": 3, "p95": 0, "max": 4}
    assert "regions: 10, 0 to 4 an image, 3 in the median; 6 of no use (2 outside, 1 " in done.stdout


def test_a_source_without_regions_has_no_line_of_them(folder):
    done = data("stats", str(folder(3)), "--workers", "0")
    assert done.returncode == 0 and "regions:" not in done.stdout and "with regions" not in done.stdout
