"""Whole runs: what comes out, what is logged, what is refused, and that ranks and steps change nothing."""

from __future__ import annotations

import errno
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from locfast.data.sources import open_source
from locfast.vesl.aside import Aside
from locfast.vesl.commands import shared
from locfast.vesl.meter import Meter, rates, told
from tests.vesl.conftest import CAPTIONS, PHOTOS, jpeg
from tests.vesl.vesl_processes import contents, start

pytestmark = pytest.mark.usefixtures("nltk_data")


def log(out: Path) -> list[dict]:
    return [json.loads(line) for file in sorted((out / "log").iterdir()) for line in file.read_text().splitlines()]


def test_every_image_with_a_caption_becomes_a_sample_with_its_bytes_caption_and_regions(
    tmp_path, pairs, vesl, flags
) -> None:
    code, told = vesl("run", "--data", pairs(12), "--out", tmp_path / "out", *flags)
    assert code == 0, told
    shards = open_source(str(tmp_path / "out/shards"))
    captioned = [i for i in range(12) if CAPTIONS[i % 5]]
    assert len(shards) == len(captioned) and len(list((tmp_path / "out/shards").glob("*.tar"))) == 3
    rows = {row["index"]: row for row in log(tmp_path / "out")}
    assert sorted(rows) == list(range(12)) and rows[2]["skipped"] == "no caption"
    for place, i in enumerate(captioned):
        record = shards.read(place)
        assert record.image == jpeg(i) and list(record.texts) == CAPTIONS[i % 5]
        assert record.regions is not None and len(record.regions) == rows[i]["boxes"]
        assert rows[i]["best"] == (max(r.score for r in record.regions) if record.regions else None)
        assert all(r.score >= 0.1 and any(r.text in text.lower() for text in record.texts) for r in record.regions)
    assert shards.read(captioned.index(3)).regions == ()  # "He sees it." has no phrase: looked at, and none found
    assert sum(row.get("boxes", 0) for row in rows.values()) > 12
    assert "images/s" in told and "busy" in told


def test_steps_one_by_one_give_the_same_as_a_whole_run(tmp_path, pairs, vesl, flags) -> None:
    data = pairs(12, bad=(4,))
    assert vesl("run", "--data", data, "--out", tmp_path / "whole", *flags)[0] == 0
    common = ["--out", tmp_path / "steps", "--batch-size", 2, "--workers", 1, "--device", "cpu"]
    assert vesl("caption", "--data", data, *common, "--shard-size", 5, "--captions", "given")[0] == 0
    assert vesl("phrases", *common)[0] == 0
    assert vesl("detect", *common, *flags[2:6])[0] == 0
    assert contents(tmp_path / "steps") == contents(tmp_path / "whole")


def test_two_ranks_make_the_files_of_one(tmp_path, pairs, vesl, flags, models) -> None:
    command = ["run", "--data", pairs(22, bad=(7,)), *flags]
    assert vesl(*command, "--out", tmp_path / "one")[0] == 0
    environment = {"NLTK_DATA": str(models / "nltk"), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        start([*command, "--out", tmp_path / "two"], tmp_path / f"told-{rank}", {**environment, "RANK": str(rank)})
        for rank in range(2)
    ]
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "told-0").read_text()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert not (tmp_path / "two/.aside").exists()
    for rank in range(2):
        told = (tmp_path / f"told-{rank}").read_text()
        assert f"[rank {rank}] detect: chunk {rank + 1} of 5" in told and f"chunk {2 - rank} of 5" not in told


def test_unreadable_images_are_named_in_the_log_and_stop_nothing(tmp_path, pairs, vesl, flags) -> None:
    data = pairs(9, bad=(1, 5))
    (data.parent / "006.jpg").unlink()
    code, told = vesl("run", "--data", data, "--out", tmp_path / "out", *flags)
    assert code == 0, told
    skipped = {row["index"]: (row["name"], row["skipped"]) for row in log(tmp_path / "out") if "skipped" in row}
    assert sorted(skipped) == [1, 2, 5, 6, 7]  # 2 and 7 have no caption
    assert skipped[1] == (str(data.parent / "001.jpg"), "unreadable: not an image of a known format")
    assert skipped[6] == (str(data.parent / "006.jpg"), "unreadable: No such file or directory")
    assert len(open_source(str(tmp_path / "out/shards"))) == 4


def test_a_chunk_of_which_no_file_is_there_stops_the_run_and_is_not_written(tmp_path, pairs, vesl, flags) -> None:
    """A disk that is gone must not become a thousand empty shards."""
    data = pairs(20)
    for i in range(10, 20):
        (data.parent / f"{i:03}.jpg").unlink()
    code, told = vesl("run", "--data", data, "--out", tmp_path / "out", *flags, "--shard-size", 10)
    assert code == 2 and "Is the disk still there?" in told and "Traceback" not in told
    assert [path.name for path in (tmp_path / "out/captions").iterdir()] == ["000000.jsonl"]


def test_a_disk_that_is_gone_stops_the_detector_though_some_images_had_no_caption(tmp_path, pairs, vesl, flags) -> None:
    data, out = pairs(20), tmp_path / "out"
    common = ["--out", out, "--batch-size", 2, "--workers", 0, "--device", "cpu"]
    assert vesl("caption", "--data", data, *common, "--shard-size", 10, "--captions", "given")[0] == 0
    assert vesl("phrases", *common)[0] == 0
    for i in range(10, 20):
        (data.parent / f"{i:03}.jpg").unlink()
    code, told = vesl("detect", *common, *flags[2:6])
    assert code == 2 and "none of the 8 files of chunk 2" in told and "Traceback" not in told
    assert [path.name for path in (out / "shards").iterdir()] == ["000000.tar"]


def test_an_image_never_gets_the_caption_of_another_one(tmp_path, vesl, flags) -> None:
    """As many files as before, but one went and one came: every sample has moved."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for i in range(6):
        (photos / f"{i}.jpg").write_bytes(jpeg(i))
        (photos / f"{i}.txt").write_text("a red dog")
    common = ["--out", out, "--batch-size", 2, "--workers", 0, "--device", "cpu"]
    assert vesl("caption", "--data", photos, *common, "--shard-size", 6, "--captions", "given")[0] == 0
    assert vesl("phrases", *common)[0] == 0
    made = contents(out)
    (photos / "0.jpg").rename(photos / "9.jpg")
    for again in (["detect", *flags[2:6]], ["phrases"], ["caption", "--captions", "given"]):
        code, told = vesl(*again, *common)
        assert code == 2 and "as many samples as at the start, but other ones" in told and "Traceback" not in told
    assert contents(out) == made
    (photos / "9.jpg").rename(photos / "0.jpg")
    assert vesl("detect", *common, *flags[2:6])[0] == 0


def test_a_caption_that_was_made_of_another_file_stops_the_detector(tmp_path, pairs, vesl, flags) -> None:
    """Somebody's own phrases, say, of which the lines moved."""
    out = tmp_path / "out"
    common = ["--out", out, "--batch-size", 2, "--workers", 0, "--device", "cpu"]
    assert vesl("caption", "--data", pairs(6), *common, "--captions", "given")[0] == 0
    assert vesl("phrases", *common)[0] == 0
    file = out / "phrases/000000.jsonl"
    file.write_text(file.read_text().replace("001.jpg", "999.jpg"))
    code, told = vesl("detect", *common, *flags[2:6])
    assert code == 2 and "files came or went" in told and "Traceback" not in told
    assert not list(out.glob("shards/*"))


@pytest.mark.parametrize("bad", [(), (0, 1, 2)])
def test_a_source_without_any_caption_is_a_mistake(tmp_path, vesl, flags, models, bad) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for i in range(12):
        (photos / f"{i:02}.jpg").write_bytes(b"no image" if i in bad else jpeg(i))
    for _ in range(2):  # the second time, all chunks are there
        code, told = vesl("run", "--data", photos, "--out", out, *flags)
        assert code == 2 and "none of the 12 images has a caption (12 without a text, 0 unreadable)" in told
        assert "nothing was left" not in told and not (out / "phrases").exists()
    made = ["--captioner", models / "git", "--max-new-tokens", 5, "--overwrite"]
    assert vesl("run", "--data", photos, "--out", out, *flags[2:], *made)[0] == 0


def test_ranks_without_a_caption_of_their_own_go_on_where_another_has_one(tmp_path, vesl, flags, monkeypatch) -> None:
    """Rank 0 has the chunk without captions; and where rank 1 has none either, the last one to end says so."""
    photos = tmp_path / "photos"
    photos.mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for i in range(10):
        (photos / f"{i:02}.jpg").write_bytes(jpeg(i))
    for text, last in (("a red dog", 0), ("", 2)):
        (photos / "07.txt").write_text(text)
        for rank, expected in ((0, 0), (1, last)):
            monkeypatch.setenv("RANK", str(rank))
            code, told = vesl("run", "--data", photos, "--out", tmp_path / f"out{last}", *flags)
            assert code == expected, told
            assert "nothing was left" not in told
    assert (tmp_path / "out0/shards/000000.tar").exists() and not (tmp_path / "out2/shards/000001.tar").exists()


def test_a_full_disk_is_told_with_what_to_type(tmp_path, pairs, vesl, flags, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(Aside, "keep_lines", full)
    code, told = vesl("run", "--data", pairs(3), "--out", tmp_path / "out", *flags)
    assert code == 2 and "Free some space, then type the same command again." in told and "--resume" not in told


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("--detector-size", "70", "has patches of 16 pixels"), ("--detector", "blip", "found a model of type blip")],
)
def test_a_detector_that_is_no_use_is_told_before_anything_is_captioned(
    tmp_path, pairs, vesl, flags, models, flag, value, said
) -> None:
    wrong = [flag, models / value if flag == "--detector" else value]
    code, told = vesl("run", "--data", pairs(5), "--out", tmp_path / "out", *flags, *wrong)
    assert code == 2 and said in told and "Traceback" not in told
    assert not (tmp_path / "out/captions").exists()


@pytest.mark.parametrize("left", [0, 1000, -1, None])
def test_half_a_download_of_a_detector_is_told_before_anything_is_captioned(
    tmp_path, pairs, vesl, flags, models, left
) -> None:
    """Its one file of weights is missing or cut off, or one of several is missing (None)."""
    import shutil

    import transformers

    folder = tmp_path / "owlv2"
    shutil.copytree(models / "owlv2", folder)
    weights = folder / "model.safetensors"
    if left is None:
        model = transformers.Owlv2ForObjectDetection.from_pretrained(folder)
        weights.unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        weights = sorted(folder.glob("model-*.safetensors"))[1]
    data = weights.read_bytes()
    if left:
        weights.write_bytes(data[:left])
    else:
        weights.unlink()
    command = ["run", "--data", pairs(5), "--out", tmp_path / "out", *flags, "--detector", folder]
    code, told = vesl(*command)
    assert code == 2 and "cannot be loaded as AutoModelForZeroShotObjectDetection" in told and "Traceback" not in told
    assert not (tmp_path / "out/captions").exists()
    weights.write_bytes(data)
    assert vesl(*command)[0] == 0


@pytest.mark.parametrize("rank", ["1", "2", "-1", "x"])
def test_every_rank_tells_its_own_mistake(tmp_path, vesl, flags, monkeypatch, rank) -> None:
    """They meet nowhere, and may be on machines of their own: one that says nothing leaves its chunks undone."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, told = vesl("run", "--data", tmp_path / "absent", "--out", tmp_path / "out", *flags)
    said = "found no such file or folder" if rank == "1" else "ranks count from 0 to below WORLD_SIZE"
    assert code == 2 and said in told


def test_names_do_not_depend_on_where_the_command_is_typed(tmp_path, pairs, vesl, flags, monkeypatch) -> None:
    data = pairs(5)
    assert vesl("run", "--data", data, "--out", tmp_path / "whole", *flags)[0] == 0
    monkeypatch.chdir(data.parent)
    assert vesl("run", "--data", data.name, "--out", tmp_path / "near", *flags)[0] == 0
    assert contents(tmp_path / "near") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "pattern", ["shards/*.tar", "s{h,}ards/000000.tar", "sh*/*.tar", "shards/{000000..000001}.tar"]
)
def test_a_pattern_does_not_depend_on_where_it_is_typed(tmp_path, monkeypatch, pattern) -> None:
    (tmp_path / "shards").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shared._place(pattern) == str(tmp_path / pattern)
    assert (
        shared._place("s3://bucket/{00..12}.tar") == "s3://bucket/{00..12}.tar" and shared._place("demo:4") == "demo:4"
    )


def test_no_process_is_begun_for_phrases_without_workers(tmp_path, pairs, vesl, flags, monkeypatch) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("a pool")

    monkeypatch.setattr("locfast.vesl.stages.pool", begun)
    assert vesl("run", "--data", pairs(3), "--out", tmp_path / "out", *flags)[0] == 0


def test_shares_of_the_time_lie_between_nothing_and_all_of_it(monkeypatch) -> None:
    """Short chunks late in a long run: a difference of rounded shares would be off by many times the chunk."""
    clock = iter([0.0, 0.0, 3000.0, 86400.0, 86400.0001, 86400.0002])
    monkeypatch.setattr("locfast.vesl.meter.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = Meter()
    with meter.busy():
        pass
    before = meter.read()
    meter.images += 1
    taken = rates(meter.read(), before)
    assert taken["device_busy"] == taken["waiting_for_images"] == 0 and taken["images"] == 1
    assert "cpu busy 0 %" in told(taken, "cpu") and rates(before)["device_busy"] == round(3000 / 86400, 4)


def test_a_shard_without_any_sample_is_a_whole_one(tmp_path, pairs, vesl, flags) -> None:
    data = pairs(8, bad=(5, 6, 7))
    assert vesl("run", "--data", data, "--out", tmp_path / "out", *flags)[0] == 0
    with tarfile.open(tmp_path / "out/shards/000001.tar") as shard:
        assert shard.getnames() == []
    assert len(open_source(str(tmp_path / "out/shards"))) == 4


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--min-score", 0.3), "--min-score was 0.1, now it is 0.3"),
        (("--shard-size", 4), "--shard-size was 5, now it is 4"),
        (("--max-phrases", 7), "--max-phrases was 20, now it is 7"),
        (("--nms", 0.5), "--nms was not given, now it is 0.5"),
    ],
)
def test_other_settings_for_a_folder_are_refused_by_name(tmp_path, pairs, vesl, flags, changed, named) -> None:
    command = ["run", "--data", pairs(5), "--out", tmp_path / "out", *flags]
    assert vesl(*command)[0] == 0
    before = contents(tmp_path / "out")
    code, told = vesl(*command, *changed)
    assert code == 2 and named in told and contents(tmp_path / "out") == before
    assert vesl(*command, "--batch-size", 3)[0] == 0  # decides over nothing


def test_more_samples_than_at_the_start_are_refused(tmp_path, pairs, vesl, flags) -> None:
    data = pairs(5)
    assert vesl("run", "--data", data, "--out", tmp_path / "out", *flags)[0] == 0
    data.write_text(data.read_text() + data.read_text().splitlines()[0])
    code, told = vesl("run", "--data", data, "--out", tmp_path / "out", *flags)
    assert code == 2 and "was 5, now it is 6" in told


def test_overwrite_makes_a_step_and_those_after_it_anew(tmp_path, pairs, vesl, flags) -> None:
    command = ["run", "--data", pairs(12), "--out", tmp_path / "out", *flags]
    assert vesl(*command)[0] == 0
    first = contents(tmp_path / "out")
    anew = ["detect", "--out", tmp_path / "out", *flags[2:6], "--workers", 0, "--device", "cpu", "--overwrite"]
    assert vesl(*anew, "--max-regions", 1)[0] == 0
    second = contents(tmp_path / "out")
    assert first.keys() == second.keys() and second["captions/000000.jsonl"] == first["captions/000000.jsonl"]
    assert second["shards/000000.tar"] != first["shards/000000.tar"]
    assert max(row.get("boxes", 0) for row in log(tmp_path / "out")) == 1
    assert vesl(*command, "--shard-size", 12, "--overwrite")[0] == 0
    assert [path.name for path in (tmp_path / "out/shards").iterdir()] == ["000000.tar"]


def test_a_step_without_the_one_before_says_so(tmp_path, pairs, vesl, flags) -> None:
    data = pairs(6)
    common = ["--out", tmp_path / "out", "--workers", 0, "--device", "cpu"]
    code, told = vesl("phrases", "--data", data, *common, "--shard-size", 5)
    assert code == 2 and "2 of 2 chunks wait" in told and "locfast.vesl caption" in told
    assert vesl("caption", *common, "--captions", "given")[0] == 0
    (tmp_path / "out/captions/000001.jsonl").unlink()
    code, told = vesl("phrases", *common)
    assert code == 2 and "1 of 2 chunks wait" in told
    assert [path.name for path in (tmp_path / "out/phrases").iterdir()] == ["000000.jsonl"]


def test_generated_captions_stand_before_the_given_ones(tmp_path, pairs, vesl, models, flags) -> None:
    command = ["run", "--data", pairs(6, bad=(1,)), "--out", tmp_path / "out", *flags[2:]]
    extra = ["--captioner", models / "git", "--max-new-tokens", 5]
    code, told = vesl(*command, *extra, "--keep-given")
    assert code == 0, told
    rows = [json.loads(line) for line in (tmp_path / "out/captions/000000.jsonl").read_text().splitlines()]
    assert rows[0]["caption"] == "both" and rows[0]["captions"][1:] == CAPTIONS[0] and rows[0]["captions"][0]
    assert rows[1]["unreadable"] and rows[2]["caption"] == "generated" and len(rows[2]["captions"]) == 1
    assert vesl(*command, *extra, "--overwrite")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out/captions/000000.jsonl").read_text().splitlines()]
    assert rows[0]["caption"] == "generated" and len(rows[0]["captions"]) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--captions", "given", "--detector", "/no/such/folder"), "there is no such folder"),
        (("--captioner", "./none"), "--captioner ./none: there is no such folder"),
        (("--captions", "given", "--keep-given"), "are for a --captioner"),
        (("--captions", "given", "--min-score", 2), "--min-score is from 0 to below 1"),
        (("--captions", "given", "--detector-size", 60), "Type --detector-size 48 or 64"),
    ],
)
def test_mistakes_are_told_in_one_message_before_anything_is_written(
    tmp_path, pairs, vesl, models, given, said
) -> None:
    detector = () if "--detector" in given else ("--detector", models / "owlv2")
    size = () if "--detector-size" in given else ("--detector-size", 64)
    code, told = vesl("run", "--data", pairs(3), "--out", tmp_path / "out", *detector, *size, *given, "--workers", 0)
    assert code == 2 and said in told and "Traceback" not in told
    if "--detector-size" not in given:  # told when the detector is loaded, after two steps
        assert contents(tmp_path / "out") == {}


def test_a_model_that_is_in_no_cache_is_told_with_the_command(tmp_path, pairs, vesl, monkeypatch) -> None:
    import transformers

    def offline(name: str, **options: object) -> None:
        raise OSError(f"We couldn't connect to the hub to load {name}\nand more")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", offline)
    out = ["--out", tmp_path / "out", "--workers", 0, "--device", "cpu"]
    code, told = vesl("run", "--data", pairs(3), *out, "--captions", "given", "--detector", "google/owlv2-base")
    assert code == 2 and "hf download google/owlv2-base" in told and "Traceback" not in told


def test_a_folder_of_other_files_is_left_alone(tmp_path, pairs, vesl, flags) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    for more in ((), ("--overwrite",)):
        code, told = vesl("run", "--data", pairs(3, folder=f"src{len(more)}"), "--out", tmp_path / "out", *flags, *more)
        assert code == 2 and "not of VESL" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_photographs_get_regions_inside_of_them(tmp_path, vesl, flags) -> None:
    files = sorted(PHOTOS.glob("*.jpg"))[:4]
    if not files:
        pytest.skip(f"no {PHOTOS}")
    (tmp_path / "src").mkdir()
    for file in files:
        (tmp_path / "src" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "src" / file.with_suffix(".txt").name).write_text("a red dog and the big cat on a sofa\n")
    code, told = vesl("run", "--data", tmp_path / "src", "--out", tmp_path / "out", *flags)
    assert code == 0, told
    from locfast.data.decode.cpu import CpuDecoder

    shards = open_source(str(tmp_path / "out/shards"))
    for i, file in enumerate(files):
        record = shards.read(i)
        height, width = CpuDecoder().open(record.image).size
        assert record.image == file.read_bytes() and record.regions is not None
        for left, top, right, bottom in (region.box for region in record.regions):
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert sum(row["boxes"] for row in log(tmp_path / "out")) > 0


def test_a_folder_aside_whose_owner_died_before_it_locked_it_goes(tmp_path) -> None:
    (tmp_path / ".aside/host-1-abcd").mkdir(parents=True)
    mine = Aside(tmp_path)
    assert mine.removed == 1 and [path.name for path in (tmp_path / ".aside").iterdir()] == [mine.folder.name]
    mine.close()
    assert not (tmp_path / ".aside").exists()


def test_what_a_killed_process_left_aside_goes_and_what_a_living_one_holds_stays(tmp_path) -> None:
    """A lock of this very process would not keep it from its own folder, so the living one is another process."""
    import subprocess
    import sys

    code = (
        "import sys, time; from pathlib import Path; from locfast.vesl.aside import Aside\n"
        "one = Aside(Path(sys.argv[1])); (one.folder / 'half').write_text('x'); print('up', flush=True); time.sleep(60)"
    )
    living, dead = (
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in "ab"
    )
    try:
        assert living.stdout and dead.stdout and living.stdout.readline() and dead.stdout.readline()
        dead.kill()
        dead.wait()
        mine = Aside(tmp_path)
        left = [path for path in (tmp_path / ".aside").iterdir() if path != mine.folder]
        assert (
            mine.removed == 1 and len(left) == 1 and f"-{living.pid}-" in left[0].name and (left[0] / "half").exists()
        )
        mine.close()
    finally:
        living.kill()
        living.wait()
        living.stdout.close()
        dead.stdout.close()
