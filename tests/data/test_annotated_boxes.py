"""Boxes of COCO's and LVIS's files: which image has which, under what name, and where its file lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from locfast.data.regions.annotated import AnnotatedBoxes
from locfast.errors import UserError
from tests.eval.region_files import pictures, write_annotations


@pytest.mark.parametrize("lvis", [False, True])
def test_every_box_has_its_image_its_corners_and_the_name_of_its_class(tmp_path: Path, lvis: bool) -> None:
    source = AnnotatedBoxes(write_annotations(tmp_path, lvis=lvis))
    # in the order of ids, with spaces for underscores
    assert source.classes == ("leaf", "red kite", "parrot (bird)", "zebra", "hot dog")
    expected = pictures()
    assert len(source) == len(expected)
    for index, (data, (width, height), boxes) in enumerate(expected):
        record = source.read(index)
        assert record.image == data and source.sizes[index].tolist() == [height, width]
        corners = {((x, y, x + w, y + h), name.replace("_", " ")) for (x, y, w, h), name in boxes}
        assert record.regions is not None and {(one.box, one.text) for one in record.regions} == corners
        assert record.name == source.name(index)
    assert (source.left_out, source.empty) == (({}, 0) if lvis else ({"crowd": 1}, 1))


def test_images_are_found_in_the_layouts_in_which_they_are_distributed(tmp_path: Path) -> None:
    file = write_annotations(tmp_path / "coco")
    data = AnnotatedBoxes(file).read(3).image
    (tmp_path / "coco/images").mkdir()
    shutil.move(tmp_path / "coco/val2017", tmp_path / "coco/images/val2017")
    assert AnnotatedBoxes(file).read(3).image == data
    shutil.move(tmp_path / "coco/images/val2017", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--image-folder"):
        AnnotatedBoxes(file)
    assert AnnotatedBoxes(file, tmp_path / "elsewhere").read(3).image == data

    file = write_annotations(tmp_path / "lvis", lvis=True)
    beside = file.rename(tmp_path / "lvis/lvis_v1_val.json")
    assert AnnotatedBoxes(beside).read(3).image == data
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in (tmp_path / "lvis").glob("*2017/*.jpg"):
        shutil.move(image, flat)
    assert AnnotatedBoxes(beside, flat).read(3).image == data


def changed(file: Path, change) -> Path:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["annotations"][0].update(category_id=1), "one of category 1, which the file does not list"),
        (lambda c: c["annotations"][0].update(image_id=77), "one of image 77"),
        (lambda c: c["annotations"][0].pop("bbox"), "is not as COCO's are"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "is not as COCO's are"),
        (lambda c: c.pop("categories"), "found no list 'categories'"),
        (lambda c: c["annotations"].clear(), "found none among 13 images"),
        (lambda c: c["images"][4].update(file_name="gone.jpg"), "found 1 absent"),
    ],
)
def test_a_file_of_another_form_is_told(tmp_path: Path, change, told: str) -> None:
    file = changed(write_annotations(tmp_path), change)
    with pytest.raises(UserError) as error:
        AnnotatedBoxes(file)
    assert told in str(error.value) and str(tmp_path) in str(error.value)


def test_no_file_and_no_json_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        AnnotatedBoxes(tmp_path / "instances_val2017.json")
    (tmp_path / "x.json").write_text("nonsense")
    with pytest.raises(UserError, match="no JSON"):
        AnnotatedBoxes(tmp_path / "x.json")
