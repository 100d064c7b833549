"""Visual Genome: region descriptions of either version, images in its two folders, captions by COCO's numbers."""

import json

import pytest
from convert_files import put, refused, run, written

URL = "https://cs.stanford.edu/people/rak248"


def region(id: int, image: int, phrase: str, x: int, y: int, width: int, height: int) -> dict:
    box = {"region_id": id, "width": width, "height": height, "image_id": image, "phrase": phrase, "y": y, "x": x}
    return box


@pytest.fixture
def genome(tmp_path, jpeg):
    """In the form of version 1.2, where an image is `id` in one file and `image_id` in the other."""
    return put(
        tmp_path,
        {
            "VG_100K_2/1.jpg": jpeg(80, 60),
            "VG_100K/2.jpg": jpeg(50, 40),
            "region_descriptions.json": [
                {
                    "regions": [
                        region(1382, 1, "the clock is green in colour", 42, 5, 8, 14),
                        region(1383, 1, "shade is along the street ", -3, 40, 90, 30),
                        region(1384, 1, " ", 1, 1, 5, 5),
                    ],
                    "id": 1,
                },
                {"regions": [region(2000, 2, "a red car", 0, 0, 10, 10)], "id": 2},
                {"regions": [region(2001, 3, "a ghost", 0, 0, 10, 10)], "id": 3},
            ],
            "image_data.json": [
                {"width": 80, "url": f"{URL}/VG_100K_2/1.jpg", "height": 60, "image_id": 1, "coco_id": None}
                | {"flickr_id": None},
                {"width": 50, "url": f"{URL}/VG_100K/2.jpg", "height": 40, "image_id": 2, "coco_id": 547168}
                | {"flickr_id": 8505158818},
            ],
            "captions.json": {"annotations": [{"image_id": 547168, "id": 1, "caption": "Cars on a road."}]},
        },
    )


def converted(genome, *others: object, images: tuple[str, ...] = (".",)) -> list:
    files = (genome / "region_descriptions.json", genome / "image_data.json")
    folders = [genome / name for name in images]
    assert run("visual-genome", *files, "--images", *folders, *others, "--out", genome / "vg.jsonl") == 0
    return written(genome / "vg.jsonl")


@pytest.mark.parametrize("images", [(".",), ("VG_100K", "VG_100K_2")])
def test_regions_become_boxes_within_the_image(genome, images, capsys):
    first, second = converted(genome, images=images)
    clock = ((42.0, 5.0, 50.0, 19.0), "the clock is green in colour")
    shade = ((0.0, 40.0, 80.0, 60.0), "shade is along the street")  # it reaches over three borders
    assert first == ("VG_100K_2/1.jpg", None, [clock, shade])
    assert second == ("VG_100K/2.jpg", None, [((0.0, 0.0, 10.0, 10.0), "a red car")])
    out = capsys.readouterr().out
    assert "  dropped 1 image: not in image_data.json, e.g. image 3\n" in out
    assert "  dropped 1 region: no text\n" in out


def test_captions_come_from_coco_where_an_image_is_its(genome):
    assert [text for _, text, _ in converted(genome, "--captions", genome / "captions.json")] == [
        None,
        "Cars on a road.",
    ]


def test_version_1_0_whose_keys_are_named_otherwise_reads_the_same(genome):
    told = converted(genome)

    images = json.loads((genome / "image_data.json").read_text())
    regions = json.loads((genome / "region_descriptions.json").read_text())
    for one in images:
        one["id"] = one.pop("image_id")
    for one in regions:
        one["image_id"] = one.pop("id")
    put(genome, {"image_data.json": images, "region_descriptions.json": regions})
    assert converted(genome, "--overwrite") == told


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("region_descriptions.json", {"a": 1}, "found no list of objects; give Visual Genome's file"),
        ("region_descriptions.json", [{"regions": []}], "it needs an image_id or id"),
        ("region_descriptions.json", [{"id": 1, "regions": [{"x": 1}]}], "it needs regions of {phrase, x, y"),
        ("image_data.json", [{"image_id": 1, "width": 80}], "it needs url, width and height"),
        ("image_data.json", "no JSON", "found a file that is no JSON"),
    ],
)
def test_a_file_that_is_not_as_published_is_refused(genome, file, content, message):
    put(genome, {file: content})
    files = (genome / "region_descriptions.json", genome / "image_data.json")
    assert message in refused("visual-genome", *files, "--images", genome, "--out", genome / "vg.jsonl")
    assert not (genome / "vg.jsonl").exists()
