"""Labelled data as files of class ids, checks of it, and what a batch makes of it; mistakes name their files."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_files import MAP, SIZE, ids, png, put, put_coco_stuff, refused
from PIL import Image

from locfast.data.decode import UnreadableImage
from locfast.data.decode.cpu import decode_label_map
from locfast.data.labelled import LAYOUTS, check_disjoint, check_sample, open_labelled
from locfast.data.loader import Loader
from locfast.data.scenes import CLASSES
from locfast.data.spec import ImageSpec, View


@pytest.fixture
def plain(tmp_path, jpeg) -> Path:
    """The plain layout: three images to train on, two to validate."""
    files = {"classes.txt": "sky\nroad\ntree\n\n"}
    for split, names in {"train": ("a", "b/c", "d"), "val": ("e", "f")}.items():
        for i, name in enumerate(names):
            files[f"images/{split}/{name}.jpg"] = jpeg(*SIZE, seed=i)
            files[f"annotations/{split}/{name}.png"] = png(MAP)
    return put(tmp_path / "streets", files)


@pytest.fixture
def stuff(tmp_path, jpeg) -> Path:
    return put_coco_stuff(tmp_path / "coco", jpeg)


def test_a_plain_folder_opens_with_both_splits(plain):
    train, validation = open_labelled(str(plain), "train"), open_labelled(str(plain), "validation")
    assert (len(train.source), len(validation.source)) == (3, 2)
    assert train.classes == ("sky", "road", "tree")
    assert (train.layout, train.name, train.unlabeled, train.things) == ("folder", "streets", None, None)
    assert train.source.name(1) == str(plain / "images/train/b/c.jpg")
    assert train.source.label_name(1) == str(plain / "annotations/train/b/c.png")
    assert ids(train, 1) == MAP
    for kind in ("images", "annotations"):
        (plain / kind / "val").rename(plain / kind / "validation")
    assert len(open_labelled(str(plain), "validation").source) == 2
    (plain / "annotations" / "validation").rename(plain / "annotations" / "held-out")
    message = refused(open_labelled, str(plain), "validation")
    assert str(plain / "annotations/validation") in message
    assert "there are held-out, train" in message


@pytest.mark.parametrize(
    ("names", "unlabeled"), [("sky\nVoid\n", 1), ("background\nx\nunlabelled\n", 2), ("sky\nx\n", None)]
)
def test_a_class_list_says_which_id_is_unlabeled(plain, names, unlabeled):
    (plain / "classes.txt").write_text(names)
    assert open_labelled(str(plain), "train").unlabeled == unlabeled
    assert open_labelled(str(plain), "train", unlabeled=0).unlabeled == 0
    assert open_labelled(str(plain), "train", unlabeled=None).unlabeled is None
    assert "class 7" in refused(open_labelled, str(plain), "train", unlabeled=7)


def test_a_missing_or_broken_class_list_is_named(plain):
    file = plain / "classes.txt"
    for content, told in {"sky\n\nroad": "line 2 empty", "": "found 0", "x\n" * 256: "found 256"}.items():
        file.write_text(content)
        message = refused(open_labelled, str(plain), "train")
        assert str(file) in message
        assert told in message
    file.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(open_labelled, str(plain), "train")
    file.unlink()
    message = refused(open_labelled, str(plain), "train")
    assert f"{file}, found no such file" in message
    assert "one a line, that of id 0 first" in message


def test_images_and_maps_without_their_counterpart_are_named_and_counted(plain, jpeg):
    (plain / "annotations/train/a.png").unlink()
    (plain / "images/train/d.jpg").unlink()
    message = refused(open_labelled, str(plain), "train")
    assert "found 2 files" in message
    assert str(plain / "images/train/a.jpg") in message
    assert str(plain / "annotations/train/d.png") in message
    put(plain, {f"images/train/more-{i}.jpg": jpeg(*SIZE) for i in range(5)})
    message = refused(open_labelled, str(plain), "train")
    assert message.count(".jpg") == 6  # five names, and the example of what is wanted
    assert "and 2 more" in message


def test_ade20k_opens_as_it_is_distributed(tmp_path, jpeg):
    rows = [(1, "wall", 1), (2, "building, edifice", 1), (3, "screen, crt", 0), (4, "screen, silver screen", 0)]
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(f"{i}\t0.1\t5\t6\t{s}\t{n}\n" for i, n, s in rows)
    files = {"objectInfo150.txt": table}
    for split, word in {"training": "train", "validation": "val"}.items():
        files[f"images/{split}/ADE_{word}_00000001.jpg"] = jpeg(*SIZE)
        files[f"annotations/{split}/ADE_{word}_00000001.png"] = png([[0, 1, 2, 3, 4, 0]] * 5)
    root = put(tmp_path / "ADEChallengeData2016", files)
    for split in ("train", "validation"):
        opened = open_labelled(str(root), split)
        assert opened.classes == ("unlabeled", "wall", "building", "screen, crt", "screen, silver screen")
        assert (opened.layout, opened.unlabeled, opened.things) == ("ade20k", 0, {3, 4})
        assert ids(opened, 0)[0] == [0, 1, 2, 3, 4, 0]
        check_sample(opened, 0)
    (root / "objectInfo150.txt").write_text(table.replace("Stuff\t", "").replace("\t0\t", "\t").replace("\t1\t", "\t"))
    assert open_labelled(str(root), "train").things is None
    for broken in ("", "Idx\tName\n2\twall\n", "wall\nbuilding\n"):
        (root / "objectInfo150.txt").write_text(broken)
        assert f"{root / 'objectInfo150.txt'}, found no table" in refused(open_labelled, str(root), "train")
    (root / "objectInfo150.txt").unlink()
    assert f"{root / 'objectInfo150.txt'}, found no such file" in refused(open_labelled, str(root), "train")


def test_coco_stuff_maps_move_up_by_one_and_255_becomes_unlabeled(stuff):
    train, validation = open_labelled(str(stuff), "train"), open_labelled(str(stuff), "validation")
    check_disjoint(train, validation)
    for split in (train, validation):
        assert ids(split, 0) == [[1, 2, 91, 92, 182, 0]] * 5
        assert split.source.read(0).label_map.startswith(b"P5 6 5 255\n")
        check_sample(split, 0)
    assert (train.layout, train.unlabeled, len(train.classes), train.classes[182]) == (
        "coco-stuff",
        0,
        183,
        "class 182",
    )
    assert train.things == set(range(1, 92))


def test_coco_stuff_may_lie_in_images_and_annotations(stuff):
    (stuff / "images").mkdir()
    (stuff / "train2017").rename(stuff / "images/train2017")
    (stuff / "stuffthingmaps").rename(stuff / "annotations")
    assert ids(open_labelled(str(stuff), "train"), 0)[0] == [1, 2, 91, 92, 182, 0]


def test_coco_stuff_needs_its_list_of_names(stuff):
    file = stuff / "labels.txt"
    file.write_text("1: unlabeled\n0: person\n")
    assert f"{file}, found something else" in refused(open_labelled, str(stuff), "train")
    file.unlink()
    assert f"{file}, found no such file" in refused(open_labelled, str(stuff), "train")


def test_ids_that_coco_stuff_does_not_have_are_told_as_they_stand_in_the_file(stuff):
    file = stuff / "stuffthingmaps/train2017/000000000009.png"
    file.write_bytes(png([[0, 182, 254, 181, 255, 3]] * 5))
    message = refused(check_sample, open_labelled(str(stuff), "train"), 0)
    assert "ids 182, 254 in the map" in message
    assert "0 to 181, and 255" in message


def test_a_folder_of_no_known_layout_is_told_what_was_looked_for(tmp_path, jpeg):
    root = put(tmp_path / "photos", {"a.jpg": jpeg()})
    message = refused(open_labelled, str(root), "train")
    for name in (
        *LAYOUTS,
        "classes.txt",
        "objectInfo150.txt",
        "stuffthingmaps",
        "panoptic_train2017",
        "instances_train2017",
    ):
        assert name in message
    assert "did you mean 'photos'?" in refused(open_labelled, str(tmp_path / "fotos"), "train")


def grey_of_4_bits() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *SIZE, 4, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\x01\x01\x01" * SIZE[1])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_label_maps_that_cannot_be_right_are_named_with_their_image(plain, jpeg, picture, encode):
    image, label_map = plain / "images/train/b/c.jpg", plain / "annotations/train/b/c.png"
    split = open_labelled(str(plain), "train")
    check_sample(split, 1)
    bad = {
        "6 x 5 pixels in the image (upright, as EXIF has it) and 5 x 6 in the map": png(np.transpose(MAP)),
        "ids 3, 200 in the map, which are no classes": png([[0, 3, 200, 1, 2, 255]] * 5),
        "0 to 2, and 255": png([[3] * 6] * 5),
        "mode RGB": png(np.zeros((5, 6, 3))),
        "mode I;16": png(MAP, "I;16"),
        "grey of 4 bits": grey_of_4_bits(),
        "a JPEG": encode(picture(*SIZE).convert("L")),
        "the file is empty": b"",
    }
    for told, data in bad.items():
        label_map.write_bytes(data)
        message = refused(check_sample, split, 1)
        assert told in message
        assert str(image) in message
        assert str(label_map) in message
    label_map.write_bytes(png(MAP, "P"))
    check_sample(split, 1)
    image.write_bytes(b"no image")
    assert str(label_map) in refused(check_sample, split, 1)
    image.unlink()
    assert str(image) in refused(check_sample, split, 1)


def test_grey_of_fewer_bits_is_not_stretched_to_other_ids():
    with pytest.raises(UnreadableImage, match="4 bits"):
        decode_label_map(grey_of_4_bits())


def test_a_label_map_belongs_to_the_upright_image(plain, picture, encode):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (plain / "images/train/a.jpg").write_bytes(encode(picture(5, 6), exif=exif))
    split = open_labelled(str(plain), "train")
    check_sample(split, 0)  # the map is 6 x 5
    (plain / "annotations/train/a.png").write_bytes(png(np.transpose(MAP)))
    assert "must agree" in refused(check_sample, split, 0)


def test_splits_with_a_common_image_are_refused(plain, jpeg):
    train = open_labelled(str(plain), "train")
    check_disjoint(train, open_labelled(str(plain), "validation"))
    put(plain, {"images/val/c.jpg": jpeg(*SIZE), "annotations/val/c.png": png(MAP)})
    check_disjoint(train, open_labelled(str(plain), "validation"))  # b/c.jpg is another one
    put(plain, {"images/val/b/c.jpg": jpeg(*SIZE), "annotations/val/b/c.png": png(MAP)})
    message = refused(check_disjoint, train, open_labelled(str(plain), "validation"))
    assert "found 1 of the same name" in message
    assert str(plain / "images/val/b/c.jpg") in message


def test_the_demo_has_two_streams_that_belong_to_its_seed():
    train, validation = open_labelled("demo", "train", seed=3), open_labelled("demo", "validation", seed=3)
    assert (len(train.source), len(validation.source)) == (2048, 1024)
    assert (train.classes, train.unlabeled, train.layout, train.name) == (CLASSES, 0, "scenes", "demo")
    assert (train.source.name(5), validation.source.name(5)) == ("scene-20003-5", "scene-30003-5")
    assert train.source.read(0).name == train.source.name(0)
    check_disjoint(train, validation)
    check_sample(validation, 1023)


def test_street_scenes_open_with_both_splits(shared):
    train, validation = (open_labelled(str(shared("camvid")), split) for split in ("train", "validation"))
    assert (len(train.source), len(validation.source)) == (367, 101)
    assert (len(train.classes), train.unlabeled) == (11, None)  # what has no class there is 255
    check_disjoint(train, validation)
    for index in range(0, 101, 20):
        check_sample(validation, index)


def slow_view(label_map: list[list[int]], size: tuple[int, int], crop_pct: float) -> list[list[int]]:
    """The pixels of a centre crop, nearest neighbour, one after the other in whole numbers."""
    source = len(label_map), len(label_map[0])
    target = [int(side / crop_pct) for side in size]
    if target[0] == target[1]:
        short = min(source)
        resized = [target[0] if side == short else target[0] * side // short for side in source]
    else:
        ratio = min(source[0] / target[0], source[1] / target[1])
        resized = [round(side / ratio) for side in source]
    first = [round((resized[axis] - size[axis]) / 2) for axis in (0, 1)]
    view = []
    for y in range(size[0]):
        row = (2 * (y + first[0]) + 1) * source[0] // (2 * resized[0])
        columns = [(2 * (x + first[1]) + 1) * source[1] // (2 * resized[1]) for x in range(size[1])]
        view.append([label_map[row][column] for column in columns])
    return view


@pytest.mark.parametrize("layout", ["plain", "stuff"])
@pytest.mark.parametrize(("size", "crop_pct"), [((28, 28), 1.0), ((28, 28), 0.875), ((21, 35), 0.9)])
def test_label_maps_of_a_batch_agree_with_a_plain_loop(request, layout, size, crop_pct, jpeg):
    # Odd sides: no view pixel's centre lies on the border of two source pixels, so there is one nearest of them.
    root, sides = request.getfixturevalue(layout), [(53, 37), (31, 77), (41, 41), (5, 9), (301, 155)]
    images, maps = ("images/val", "annotations/val") if layout == "plain" else ("val2017", "stuffthingmaps/val2017")
    names = {"plain": ("e", "f", "g", "h", "i"), "stuff": ("000000000139", "1390", "1391", "1392", "1393")}[layout]
    values = np.array([0, 1, 2, 255] if layout == "plain" else [0, 7, 181, 255], dtype=np.uint8)
    expected = []
    for i, (name, (width, height)) in enumerate(zip(names, sides, strict=True)):
        label_map = values[np.random.default_rng(i).integers(0, 4, (height, width))]
        put(root, {f"{images}/{name}.jpg": jpeg(width, height), f"{maps}/{name}.png": png(label_map)})
        shift = 0 if layout == "plain" else 1
        moved = [[(id + shift) % 256 for id in row] for row in label_map.tolist()]
        expected.append(slow_view(moved, size, crop_pct))
    split = open_labelled(str(root), "validation")
    view = View(size, (0.5,) * 3, (0.5,) * 3, crop="center", crop_pct=crop_pct)
    loader = Loader(split.source, ImageSpec({"image": view}, label_map=True), seed=0, workers=0)
    (batch,) = loader.sequential(0, [torch.arange(len(sides))])
    assert loader.replaced.count == 0
    assert batch["label_map"]["image"].tolist() == expected
    assert {0, 255 if layout == "plain" else 8} < set(batch["label_map"]["image"].unique().tolist())
