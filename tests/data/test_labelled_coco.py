"""Labelled data from COCO's JSON files; every mistake names the files that it is about."""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from labelled_files import MAP, SIZE, ids, png, put, put_coco_stuff, refused

from locfast.data.labelled import check_sample, open_labelled

CATEGORIES = [{"id": 200, "name": "rug"}, {"id": 3, "name": "car"}, {"id": 1, "name": "person"}]


@pytest.fixture
def panoptic(tmp_path, jpeg) -> Path:
    colours = np.zeros((5, 6, 3), dtype=np.uint8)
    colours[0, :3] = (1, 2, 3)  # 1 + 256 * 2 + 65536 * 3
    colours[1:3] = (200, 0, 0)
    colours[3, 1] = (0, 200, 0)
    segments = [{"id": 197121, "category_id": 3}, {"id": 200, "category_id": 200}, {"id": 51200, "category_id": 1}]
    content = {
        "images": [{"id": 7, "file_name": "x.jpg", "height": 5, "width": 6}],
        "annotations": [{"image_id": 7, "file_name": "x.png", "segments_info": segments}],
        "categories": [{**one, "isthing": int(one["id"] < 200)} for one in CATEGORIES],
    }
    files = {
        "annotations/panoptic_train2017.json": json.dumps(content),
        "annotations/panoptic_train2017/x.png": png(colours),
        "train2017/x.jpg": jpeg(*SIZE),
    }
    return put(tmp_path / "coco", files)


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


@pytest.fixture
def instances(tmp_path, jpeg) -> Path:
    """Two images, the second without objects, their annotations in an order of their own."""
    shapes = [
        (1, 0, [box(2, 1, 3, 2)]),  # a person of one pixel, listed first and yet on top
        (3, 0, [box(1, 1, 5, 4), [0, 0, 9, 9]]),  # a car below it; two points enclose nothing
        (200, 0, {"size": [5, 6], "counts": "05i0"}),  # a rug: the first column, compressed
        (1, 1, {"size": [5, 6], "counts": [3, 12, 15]}),  # a crowd: columns 0 (from row 3) to 2, below everything
        (3, 0, []),
        (3, 0, [box(5, 0, 6, 1), box(5, 4, 6, 5)]),  # a car in two parts
        (1, 0, [box(5, 4, 6, 5), box(4, 4, 5, 5)]),  # as large, listed later: on top
    ]
    annotations = [
        {"id": i, "image_id": 4, "category_id": category, "iscrowd": crowd, "segmentation": shape}
        for i, (category, crowd, shape) in enumerate(shapes)
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 5, "width": 6} for i in (4, 2)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    files = {"annotations/instances_val2017.json": json.dumps(content)}
    files |= {f"val2017/{i}.jpg": jpeg(*SIZE) for i in (2, 4)}
    return put(tmp_path / "coco", files)


def test_panoptic_colours_become_classes_behind_unlabeled(panoptic):
    split = open_labelled(str(panoptic), "train")
    assert split.classes == ("unlabeled", "person", "car", "rug")
    assert (split.layout, split.unlabeled, split.things) == ("coco-panoptic", 0, {1, 2})
    assert ids(split, 0) == [[2, 2, 2, 0, 0, 0], [3] * 6, [3] * 6, [0, 1, 0, 0, 0, 0], [0] * 6]
    assert split.source.name(0) == str(panoptic / "train2017/x.jpg")
    check_sample(split, 0)
    assert "panoptic_val2017.json" in refused(open_labelled, str(panoptic), "validation")


def test_what_a_panoptic_file_lists_must_be_there(panoptic):
    file, maps = panoptic / "annotations/panoptic_train2017.json", panoptic / "annotations/panoptic_train2017"
    maps.rename(panoptic / "panoptic_train2017")  # beside the annotations is right too
    maps = panoptic / "panoptic_train2017"
    split = open_labelled(str(panoptic), "train")
    (maps / "x.png").write_bytes(png(np.full((5, 6, 3), 9)))
    message = refused(check_sample, split, 0)
    assert str(maps / "x.png") in message
    assert str(panoptic / "train2017/x.jpg") in message
    assert f"segment {9 + 256 * 9 + 65536 * 9}" in message
    (maps / "x.png").write_bytes(png(MAP))
    assert "needs RGB" in refused(check_sample, split, 0)
    (maps / "x.png").unlink()
    message = refused(open_labelled, str(panoptic), "train")
    assert f"{file} lists, found 1 absent: {maps / 'x.png'}" in message
    (panoptic / "train2017/x.jpg").unlink()
    assert str(panoptic / "train2017/x.jpg") in refused(open_labelled, str(panoptic), "train")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"annotations": [{"image_id": 8, "file_name": "x.png", "segments_info": []}]}, "image 8"),
        (
            {"annotations": [{"image_id": 7, "file_name": "x.png", "segments_info": [{"id": 1, "category_id": 5}]}]},
            "category 5",
        ),
        ({"annotations": [{"image_id": 7, "file_name": "x.png"}]}, "segments_info"),
        ({"annotations": []}, "found none"),
        ({"categories": {}}, "no list 'categories'"),
        ({"categories": [{"id": i, "name": "x"} for i in range(255)]}, "found 256"),
    ],
)
def test_a_panoptic_file_that_contradicts_itself_is_named(panoptic, change, told):
    file = panoptic / "annotations/panoptic_train2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    message = refused(open_labelled, str(panoptic), "train")
    assert str(file) in message
    assert told in message


def test_a_file_that_is_no_json_is_named(panoptic):
    file = panoptic / "annotations/panoptic_train2017.json"
    file.write_text('{"images": [')
    assert f"{file}, found a file that is no JSON" in refused(open_labelled, str(panoptic), "train")


def test_small_instances_lie_on_large_ones_and_crowds_below_all(instances):
    pytest.importorskip("pycocotools.mask")
    split = open_labelled(str(instances), "validation")
    assert split.classes == ("unlabeled", "person", "car", "rug")
    assert (split.layout, split.unlabeled, split.things) == ("coco-instances", 0, {1, 2, 3})
    assert ids(split, 0) == [
        [3, 255, 255, 0, 0, 2],
        [3, 2, 1, 2, 2, 0],
        [3, 2, 2, 2, 2, 0],
        [3, 2, 2, 2, 2, 0],
        [3, 255, 255, 0, 1, 1],
    ]
    assert ids(split, 1) == [[0] * 6] * 5
    for index in (0, 1):
        check_sample(split, index)
    assert str(instances / "annotations/instances_val2017.json") in split.source.label_name(0)


def test_instances_are_those_of_pycocotools(tmp_path, jpeg):
    coco = pytest.importorskip("pycocotools.coco")
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": "one.jpg", "height": 61, "width": 83} for i in range(8)]
    annotations = [
        {
            "id": k,
            "image_id": int(rng.integers(8)),
            "category_id": [1, 3, 200][k % 3],
            "segmentation": [rng.uniform(0, 60, count).round(2).tolist() for count in (10, 14)],
        }
        for k in range(40)
    ]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    file = "annotations/instances_train2017.json"
    root = put(tmp_path, {file: json.dumps(content), "train2017/one.jpg": jpeg(83, 61)})
    split, peer = open_labelled(str(root), "train"), coco.COCO(str(root / file))
    for i in range(8):
        expected = np.zeros((61, 83), dtype=np.uint8)
        listed = peer.loadAnns(peer.getAnnIds(imgIds=[i]))
        masks = [(peer.annToMask(one), [1, 3, 200].index(one["category_id"]) + 1) for one in listed]
        for mask, id in sorted(masks, key=lambda one: -int(one[0].sum())):
            expected[mask == 1] = id
        assert ids(split, i) == expected.tolist()


def test_outlines_are_no_python_objects_that_every_worker_would_copy(tmp_path, jpeg):
    pytest.importorskip("pycocotools.mask")
    images = [{"id": i, "file_name": "one.jpg", "height": 5, "width": 6} for i in range(50)]
    annotations = [
        {"image_id": i % 50, "category_id": 1, "segmentation": [box(0, 0, 2, 2), box(3, 3, 5, 5)]} for i in range(2000)
    ]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    root = put(
        tmp_path, {"annotations/instances_train2017.json": json.dumps(content), "train2017/one.jpg": jpeg(*SIZE)}
    )
    del content, annotations
    gc.collect()
    before = len(gc.get_objects())
    split = open_labelled(str(root), "train")
    gc.collect()
    assert len(gc.get_objects()) - before < 1000  # there are 4000 outlines
    assert ids(split, 49)[4] == [0, 0, 0, 1, 1, 0]


def test_instances_without_pycocotools_are_refused_in_one_message(instances, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    message = refused(open_labelled, str(instances), "validation")
    assert "pip install 'locfast[coco]'" in message
    assert "instances_val2017.json" in message


def test_what_an_instance_file_lists_must_be_there_and_fit(instances):
    pytest.importorskip("pycocotools.mask")
    file = instances / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][2]["segmentation"]["size"] = [6, 5]
    file.write_text(json.dumps(content))
    assert "annotation 2 with a mask of height and width [6, 5]" in refused(open_labelled, str(instances), "validation")
    (instances / "val2017/2.jpg").unlink()
    message = refused(open_labelled, str(instances), "validation")
    assert f"{file} lists, found 1 absent: {instances / 'val2017/2.jpg'}" in message


def test_a_suffix_chooses_among_several_layouts(panoptic, jpeg):
    stuff = put_coco_stuff(panoptic, jpeg)
    assert open_labelled(str(stuff), "validation").layout == "coco-stuff"
    (stuff / "train2017/x.jpg").rename(stuff / "x.jpg")  # or it would lack its COCO-Stuff map
    assert open_labelled(str(stuff), "train").layout == "coco-stuff"
    (stuff / "x.jpg").rename(stuff / "train2017/x.jpg")
    assert open_labelled(f"{stuff}::coco-panoptic", "train").layout == "coco-panoptic"
    assert "did you mean 'coco-panoptic'?" in refused(open_labelled, f"{stuff}::coco-panoptics", "train")
    message = refused(open_labelled, f"{stuff}::ade20k", "train")
    assert "objectInfo150.txt" in message
    assert "stuffthingmaps" not in message
