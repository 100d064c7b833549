"""Regions come with their images from JSON Lines and shards, under all promises of the loader."""

import logging
import math
import pickle

import pytest
import torch

from locfast.data.loader import Loader
from locfast.data.regions.shards import write_shard
from locfast.data.scenes import SceneSource
from locfast.data.sources import ImageFolder, JsonLines, open_source
from locfast.data.spec import ImageSpec, Record, Region, View
from locfast.errors import UserError
from tests.data.test_texts import write

SPEC = ImageSpec({"image": View((16, 16), (0.5,) * 3, (0.5,) * 3, crop="pad")}, records=True, regions=True)
BOX = [4, 5.5, 30, 20]


def regions_of(index: int) -> tuple[Region, ...] | None:
    """Every third sample has none, every fourth was never looked at."""
    if index % 4 == 3:
        return None
    count = 0 if index % 3 == 2 else 1 + index % 5
    return tuple(Region((i + 0.1, 2.0, 30.0 + i, 20.5), f"thing {i} of {index}", 0.5 + i / 16) for i in range(count))


def as_lines(count: int) -> list[dict]:
    lines = []
    for index in range(count):
        lines.append({"image": f"{index:03}.jpg", "text": f"picture {index}"})
        if (regions := regions_of(index)) is not None:
            lines[-1]["regions"] = [{"box": list(r.box), "text": r.text, "score": r.score} for r in regions]
    return lines


def shard(root, jpeg, count: int) -> str:
    records = [
        (f"{i:03}", "jpg", Record(jpeg(40, 30, i), text=f"picture {i}", regions=regions_of(i))) for i in range(count)
    ]
    write_shard(root / "all.tar", records)
    return str(root / "all.tar")


def test_a_line_has_regions_beside_its_texts_or_without_any(folder):
    root = folder(3)
    source = open_source(
        write(
            root / "pairs.jsonl",
            {
                "image": "000.jpg",
                "regions": [{"box": BOX, "text": " a kite ", "score": 0.75, "id": 3}, {"box": BOX, "text": ""}],
            },
            {"image": "001.jpg", "text": ["a", "b"], "regions": []},
            {"image": "002.jpg", "text": "a", "regions": None},
        )
    )
    assert isinstance(source, JsonLines)
    box = tuple(map(float, BOX))
    assert source.read(0).regions == (Region(box, "a kite", 0.75), Region(box, "", 1.0))
    assert source.read(0).text is None and source.read(0).texts == ()
    assert [(source.read(i).texts, source.read(i).regions) for i in (1, 2)] == [(("a", "b"), ()), (("a",), None)]
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i) for i in range(3)] == [source.read(i) for i in range(3)]


def test_regions_without_any_text_are_enough_for_a_file(folder):
    root = folder(1)
    source = open_source(write(root / "a.jsonl", {"image": "000.jpg", "regions": [{"box": BOX, "text": "a kite"}]}))
    assert len(source.read(0).regions) == 1
    with pytest.raises(UserError, match="1 images in it, but no text and no regions"):
        open_source(write(root / "a.jsonl", {"image": "000.jpg", "regions": []}))


def test_numbers_come_through_as_they_are(folder):
    """Also those that `regions_in_view` drops, which Python's JSON writes and reads."""
    boxes = [[0.1, 1 / 3, 1e-300, 1e300], [math.nan, math.inf, -math.inf, 0], [9, 8, 7, 6]]
    line = {"image": "000.jpg", "regions": [{"box": box, "text": "a"} for box in boxes]}
    source = open_source(write(folder(1) / "a.jsonl", line))
    assert repr([list(region.box) for region in source.read(0).regions]) == repr(
        [list(map(float, box)) for box in boxes]
    )


@pytest.mark.parametrize(
    ("regions", "told"),
    [
        ('{"a": 1}', 'regions are a list, not {"a": 1}'),
        ("[7]", "region 0 is no object but 7"),
        ('[{"box": [1, 2, 3], "text": "a"}]', '"box" of region 0 is [1, 2, 3], not [left, top, right, bottom]'),
        ('[{"box": [1, 2, 3, true], "text": "a"}]', '"box" of region 0 is [1, 2, 3, true]'),
        ('[{"box": [1, 2, 3, 4], "text": "a"}, {"text": "a"}]', '"box" of region 1 is null'),
        ('[{"box": [1, 2, 3, 4]}]', '"text" of region 0 is null, which is no string'),
        ('[{"box": [1, 2, 3, 4], "text": "a", "score": "high"}]', '"score" of region 0 is "high", which is no number'),
        ('[{"box": [1, 2, 3, 4], "text": "\\ud83d"}]', '"text" of region 0 has half of a surrogate pair'),
        (f'[{{"box": [1, 2, 3, 1{"0" * 400}], "text": "a"}}]', "a number of region 0 has hundreds of digits"),
    ],
)
def test_malformed_regions_are_told_with_file_and_line(folder, regions, told):
    fine = {"image": "000.jpg", "text": "fine"}
    file = write(folder(1) / "a.jsonl", fine, f'{{"image": "000.jpg", "text": "a", "regions": {regions}}}')
    with pytest.raises(UserError) as error:
        open_source(file)
    assert told in str(error.value) and "found line 2 wrong" in str(error.value) and file in str(error.value)
    assert '"regions": [{"box": [40, 60, 200, 180], "text": "a dog"}]' in str(error.value)


@pytest.mark.parametrize("kind", ["lines", "shard"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_has_its_own_regions_whatever_the_order_rank_or_resume(folder, tmp_path, jpeg, kind, workers):
    count, batch, ranks = 40, 12, 2
    data = write(folder(count) / "a.jsonl", *as_lines(count)) if kind == "lines" else shard(tmp_path, jpeg, count)

    def run(positions) -> list[tuple[int, tuple[Region, ...] | None]]:
        loader = Loader(open_source(data), SPEC, seed=5, workers=workers)
        batches = list(loader.batches(positions))
        assert not loader.replaced.count
        return [
            each for b in batches for each in zip(b["index"].tolist(), [r.regions for r in b["records"]], strict=True)
        ]

    steps = [torch.arange(start, start + batch) for start in range(0, 8 * batch, batch)]
    whole = run(steps)
    assert all(regions == regions_of(index) for index, regions in whole)
    assert {index for index, _ in whole} == set(range(count))
    assert run(steps[5:]) == whole[5 * batch :]
    by_rank = [run([step.chunk(ranks)[rank] for step in steps]) for rank in range(ranks)]
    part = batch // ranks
    together = [
        each for k in range(len(steps)) for rank in range(ranks) for each in by_rank[rank][k * part : (k + 1) * part]
    ]
    assert together == whole


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b'[{"box": [1, 2', "its regions cannot be used: Expecting"),
        (b'[{"box": [1, 2], "text": "a"}]', 'its regions cannot be used: "box" of region 0 is [1, 2]'),
        (b'[{"box": [1, 2, 3, 1%s], "text": "a"}]' % (b"0" * 400), "its regions cannot be used: a number of region 0"),
        (b'[{"box": [1, 2, 3, 4], "text": "\xff"}]', "its text or regions are not UTF-8"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_sample_with_broken_regions_is_replaced_counted_and_named_once(
    tmp_path, jpeg, write_tar, caplog, workers, broken, reason
):
    members = {}
    for i in range(12):
        members[f"{i:02}.jpg"] = jpeg(40, 30, i)
        members[f"{i:02}.json"] = broken if i == 5 else b'[{"box": [1, 2, 30, 20], "text": "thing %d"}]' % i
    path = write_tar(tmp_path / "s.tar", members)
    loader = Loader(open_source(str(path)), SPEC, seed=0, workers=workers)
    with caplog.at_level(logging.WARNING, "locfast"):
        batches = list(loader.batches(torch.arange(k * 12, k * 12 + 12) for k in range(2)))
    for batch in batches:
        assert len(batch["records"]) == 12
        assert [r.regions[0].text for r in batch["records"]] == [f"thing {i}" for i in batch["index"].tolist()]
    assert loader.replaced.count == 2  # two epochs
    assert list(loader.replaced.names) == [f"{path}/05"] and reason in loader.replaced.names[f"{path}/05"]
    assert len(caplog.records) == 1


def test_a_source_without_any_region_is_a_mistake_where_regions_are_needed(folder):
    with pytest.raises(UserError, match="of each of the 3 samples looked at: it has no region") as error:
        Loader(ImageFolder(folder(3)), SPEC, seed=0, workers=0)
    assert "KEY.json" in str(error.value)


def test_empty_regions_are_no_regions(folder):
    file = write(folder(3) / "a.jsonl", *({"image": f"00{i}.jpg", "text": "a", "regions": []} for i in range(3)))
    with pytest.raises(UserError, match="it has no region"):
        Loader(open_source(file), SPEC, seed=0, workers=0)


@pytest.mark.parametrize(
    "box", [[0.1, 0.2, 0.5, 0.9], [math.nan, 0, 9, 9], [30, 20, 10, 5]], ids=["shares", "NaN", "width and height"]
)
def test_boxes_of_which_none_is_a_pixel_wide_are_a_mistake(folder, box):
    lines = ({"image": f"00{i}.jpg", "text": "a", "regions": [{"box": box, "text": "a"}]} for i in range(3))
    with pytest.raises(UserError, match="in pixels of the image"):
        Loader(open_source(write(folder(3) / "a.jsonl", *lines)), SPEC, seed=0, workers=0)


def test_a_source_where_one_image_in_ten_has_regions_is_taken(folder):
    root = folder(60)
    lines = [{"image": f"{i:03}.jpg", "text": "a"} for i in range(60)]
    for line in lines[3::10]:
        line["regions"] = [{"box": BOX, "text": "a kite"}]
    loader = Loader(open_source(write(root / "a.jsonl", *lines)), SPEC, seed=0, workers=0)
    batch = next(loader.batches([torch.arange(60)]))
    assert sum(bool(record.regions) for record in batch["records"]) == 6
    assert loader.replaced.count == 0


def test_who_asks_for_no_regions_is_not_refused(folder):
    Loader(ImageFolder(folder(3)), ImageSpec(SPEC.views, records=True), seed=0, workers=0)


def test_scenes_have_what_a_method_of_texts_and_regions_needs():
    spec = ImageSpec(SPEC.views, records=True, text=True, regions=True)
    batch = next(Loader(SceneSource(20), spec, seed=0, workers=0).batches([torch.arange(20)]))
    assert all(record.text and record.regions for record in batch["records"])
