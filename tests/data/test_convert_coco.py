"""COCO and LVIS: boxes and class names, images under the names of either release, captions, what is dropped."""

import pytest
from convert_files import put, refused, run, written

NINE = "000000000009.jpg"


def instances(**changes):
    """In the form of instances_train2017.json: two images, of which the second has only a crowd."""
    content = {
        "info": {"year": 2017},
        "licenses": [{"id": 3, "name": "Attribution-NonCommercial-NoDerivs License"}],
        "images": [
            {"license": 3, "file_name": NINE, "coco_url": f"http://images.cocodataset.org/train2017/{NINE}"}
            | {"height": 48, "width": 64, "date_captured": "2013-11-19 20:40:11", "id": 9},
            {"license": 3, "file_name": "000000000025.jpg", "height": 30, "width": 40, "id": 25},
        ],
        "annotations": [
            annotation(1, 9, 67, [1.08, 18.69, 30.5, 20.25]),
            annotation(2, 9, 44, [50, 40, 20, 10]),
            annotation(3, 25, 1, [0, 0, 40, 30], iscrowd=1),
        ],
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"},
            {"supercategory": "kitchen", "id": 44, "name": "bottle"},
            {"supercategory": "furniture", "id": 67, "name": "dining table"},
        ],
    }
    return content | changes


def annotation(id: int, image: int, category: int, box: list, **others) -> dict:
    whole = {"segmentation": [[1, 2, 3, 4, 5, 6]], "area": 12.5, "iscrowd": 0, "image_id": image, "bbox": box}
    return whole | {"category_id": category, "id": id} | others


@pytest.fixture
def coco(tmp_path, jpeg):
    captions = [(9, 1, "A table  with\nbottles"), (9, 2, "Dinner"), (25, 3, "Giraffes stand")]
    return put(
        tmp_path,
        {
            f"train2017/{NINE}": jpeg(64, 48),
            "train2017/000000000025.jpg": jpeg(40, 30),
            "instances.json": instances(),
            "captions.json": {
                "images": [],
                "annotations": [{"image_id": image, "id": id, "caption": text} for image, id, text in captions],
            },
        },
    )


def test_boxes_of_objects_become_corners_with_the_name_of_their_class(coco):
    assert run("coco", coco / "instances.json", "--images", coco / "train2017", "--out", coco / "out.jsonl") == 0
    table = ((1.08, 18.69, 1.08 + 30.5, 18.69 + 20.25), "dining table")
    bottle = ((50.0, 40.0, 64.0, 48.0), "bottle")  # cut to the image of 64 x 48
    assert written(coco / "out.jsonl") == [(f"train2017/{NINE}", None, [table, bottle])]


def test_captions_keep_an_image_without_objects_and_crowds_are_counted(coco, capsys):
    captions = ("--captions", coco / "captions.json")
    run("coco", coco / "instances.json", "--images", coco / "train2017", *captions, "--out", coco / "out.jsonl")
    told = written(coco / "out.jsonl")
    assert [text for _, text, _ in told] == [["A table with bottles", "Dinner"], "Giraffes stand"]
    assert told[1][2] == []
    out = capsys.readouterr().out
    assert out.startswith("2 images, 2 regions (1.00 an image), 2 with a caption\n  dropped 1 region: a crowd\n")
    assert out.endswith(f"  python -m locfast.data stats {coco / 'out.jsonl'}\n")


def test_an_image_without_caption_and_region_is_dropped_and_counted(coco, capsys):
    run("coco", coco / "instances.json", "--images", coco / "train2017", "--out", coco / "out.jsonl")
    assert "  dropped 1 image: neither a caption nor a region, e.g. 000000000025.jpg\n" in capsys.readouterr().out


def test_captions_are_made_of_phrases_only_where_asked_and_where_there_is_none(coco):
    common = ("--images", coco / "train2017", "--compose-captions", 2)
    run("coco", coco / "instances.json", *common, "--out", coco / "a.jsonl")
    assert [text for _, text, _ in written(coco / "a.jsonl")] == ["dining table, bottle"]
    run("coco", coco / "instances.json", *common, "--captions", coco / "captions.json", "--out", coco / "b.jsonl")
    assert [text for _, text, _ in written(coco / "b.jsonl")] == [["A table with bottles", "Dinner"], "Giraffes stand"]


def test_an_image_is_found_under_its_name_of_2014_and_written_absolute_where_it_lies_elsewhere(coco):
    (coco / f"train2017/{NINE}").rename(coco / "train2017/COCO_train2014_000000000009.jpg")
    (coco / "train2017").rename(coco / "train2014")
    (coco / "lists").mkdir()
    run("coco", coco / "instances.json", "--images", coco, "--out", coco / "lists" / "out.jsonl")
    assert written(coco / "lists/out.jsonl")[0][0] == str(coco / "train2014/COCO_train2014_000000000009.jpg")


def test_an_image_of_another_size_or_missing_is_dropped_with_its_name(coco, jpeg, capsys):
    put(coco, {"train2017/000000000025.jpg": jpeg(20, 15)})
    captions = ("--captions", coco / "captions.json")
    run("coco", coco / "instances.json", "--images", coco / "train2017", *captions, "--out", coco / "out.jsonl")
    assert "dropped 1 image: another size than the annotations tell, e.g. 000000000025.jpg" in capsys.readouterr().out
    (coco / "train2017/000000000025.jpg").unlink()
    again = ("--out", coco / "out.jsonl", "--overwrite")
    run("coco", coco / "instances.json", "--images", coco / "train2017", *captions, *again)
    assert "dropped 1 image: no such image file, e.g. 000000000025.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(("told", "kept"), [((64, 48), False), ((48, 64), True)])
def test_an_image_turned_by_exif_is_taken_only_where_the_annotations_are_of_the_upright_one(
    coco, picture, encode, told, kept, capsys
):
    turned = picture(64, 48)
    exif = turned.getexif()
    exif[274] = 6  # upright it is 48 wide and 64 high
    put(coco, {f"train2017/{NINE}": encode(turned, exif=exif)})
    content = instances()
    content["images"][0] |= {"width": told[0], "height": told[1]}
    put(coco, {"instances.json": content})
    captions = ("--captions", coco / "captions.json")
    run("coco", coco / "instances.json", "--images", coco / "train2017", *captions, "--out", coco / "out.jsonl")
    assert (f"train2017/{NINE}" in [image for image, _, _ in written(coco / "out.jsonl")]) is kept
    assert ("turned or mirrored by EXIF" in capsys.readouterr().out) is not kept


BAD = {
    "a box without area": [5, 5, 0, 10],
    "a box with swapped corners": [30, 5, -10, 10],
    "a box outside the image": [64, 0, 10, 10],
    "a box or score that is no finite number": [float("nan"), 0, 5, 5],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_box_that_cannot_be_used_is_dropped_and_counted(coco, reason, capsys):
    good = annotation(1, 9, 67, [1, 2, 3, 4])
    put(coco, {"instances.json": instances(annotations=[annotation(2, 9, 1, BAD[reason]), good])})
    run("coco", coco / "instances.json", "--images", coco / "train2017", "--out", coco / "out.jsonl")
    assert [regions for _, _, regions in written(coco / "out.jsonl")] == [[((1.0, 2.0, 4.0, 6.0), "dining table")]]
    assert f"  dropped 1 region: {reason}\n" in capsys.readouterr().out


def test_the_same_box_with_the_same_text_is_taken_once(coco, capsys):
    twice = [annotation(id, 9, category, [1, 2, 3, 4]) for id, category in ((1, 67), (2, 67), (3, 44))]
    put(coco, {"instances.json": instances(annotations=twice)})
    run("coco", coco / "instances.json", "--images", coco / "train2017", "--out", coco / "out.jsonl")
    assert [text for _, text in written(coco / "out.jsonl")[0][2]] == ["dining table", "bottle"]
    assert "dropped 1 region: said twice of the same box" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked_and_a_failed_run_leaves_the_old_file(coco):
    out = coco / "out.jsonl"
    out.write_text("mine\n")
    arguments = ("coco", coco / "instances.json", "--images", coco / "train2017", "--out", out)
    assert "found a file of that name; name another, or add --overwrite" in refused(*arguments)
    put(coco, {"bad.json": instances(annotations=[annotation(1, 9, 999, [1, 2, 3, 4])])})
    assert "found one of category 999" in refused("coco", coco / "bad.json", *arguments[2:], "--overwrite")
    assert out.read_text() == "mine\n"
    assert [file.name for file in coco.iterdir() if file.name.endswith(".tmp")] == []
    assert run(*arguments, "--overwrite") == 0
    assert len(written(out)) == 1


MISTAKES = [
    (("{0}/none.json", "--images", "{0}/train2017", "--out", "{0}/o.jsonl"), "found a file that is no JSON"),
    (("{0}/captions.json", "--images", "{0}/train2017", "--out", "{0}/o.jsonl"), "found no list 'categories'"),
    (("{0}/instances.json", "--images", "{0}/none", "--out", "{0}/o.jsonl"), "found no such folder"),
    (("{0}/instances.json", "--images", "{0}/empty", "--out", "{0}/o.jsonl"), "2 x no such image file"),
    (("{0}/instances.json", "--images", "{0}/train2017", "--out", "{0}/o.json"), "which is no .jsonl; type e.g. --out"),
    (("{0}/instances.json", "--images", "{0}/train2017", "--out", "{0}/no/o.jsonl"), "make it first: mkdir -p"),
    (("{0}/instances.json", "--images", "{0}/empty", "--out", "{0}/o.jsonl", "--compose-captions", "-1"), "or 0"),
    (
        ("{0}/instances.json", "--images", "{0}/train2017", "--captions", "{0}/none.json", "--out", "{0}/o.jsonl"),
        "found no such file; check the path",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_told_and_leaves_no_file(coco, arguments, message):
    (coco / "empty").mkdir()
    assert message in refused("coco", *(one.format(coco) for one in arguments))
    assert not list(coco.glob("o.json*")) and not list(coco.glob(".*.tmp"))


def lvis():
    """In the form of lvis_v1_val.json: no file_name, but COCO's URL; names of classes with underscores."""
    image = {"date_captured": "2013-11-14 17:02:52", "neg_category_ids": [3], "not_exhaustive_category_ids": []}
    category = {"frequency": "f", "instance_count": 1, "image_count": 1, "synset": "bow.n.04", "def": "a weapon"}
    return {
        "info": {"version": "1"},
        "images": [
            image | {"id": 9, "width": 64, "height": 48, "coco_url": f"http://images.cocodataset.org/train2017/{NINE}"}
        ],
        "annotations": [
            {"area": 5.0, "id": 1, "segmentation": [[1, 2, 3, 4, 5, 6]], "image_id": 9, "bbox": [1.5, 2.0, 10.0, 4.0]}
            | {"category_id": 7}
        ],
        "categories": [category | {"id": 7, "name": "bow_(weapon)", "synonyms": ["bow_(weapon)"]}],
        "licenses": [],
    }


def test_lvis_images_are_found_by_their_url_and_classes_are_made_readable(coco):
    put(coco, {"lvis.json": lvis()})
    for number, images in enumerate((coco, coco / "train2017")):  # above the splits, or one split
        out = coco / f"{number}.jsonl"
        run("lvis", coco / "lvis.json", "--images", images, "--captions", coco / "captions.json", "--out", out)
        caption = ["A table with bottles", "Dinner"]
        assert written(out) == [(f"train2017/{NINE}", caption, [((1.5, 2.0, 11.5, 6.0), "bow (weapon)")])]
