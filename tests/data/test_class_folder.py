"""Class folders: sorted sub-folders are classes, and what is not as it should be is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from locfast.data.sources import ClassFolder
from locfast.data.sources.class_folder import check_same_classes
from locfast.errors import UserError


@pytest.fixture
def classes(tmp_path: Path, jpeg: Callable[..., bytes]) -> Callable[..., Path]:
    """Class folders by name and number of images."""

    def make(root: str = "root", **counts: int) -> Path:
        for place, (name, count) in enumerate(counts.items()):
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / root / name / f"{i}.jpg").write_bytes(jpeg(seed=100 * place + i))
        return tmp_path / root

    return make


def test_classes_labels_and_order_are_torchvisions(classes, jpeg) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    root = classes(dog=3, ant=2, Cat=1, b10=1, b9=2)
    (root / "dog" / "deep").mkdir()
    (root / "dog" / "deep" / "x.JPG").write_bytes(jpeg())
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "beside.jpg").write_bytes(jpeg())
    ours, theirs = ClassFolder(root), datasets.ImageFolder(str(root))
    assert list(ours.classes) == theirs.classes == ["Cat", "ant", "b10", "b9", "dog"]
    told = {ours.name(i): int(ours.labels[i]) for i in range(len(ours))}
    assert told == dict(theirs.samples) and len(ours) == 10
    assert ours.labels.tolist() == sorted(ours.labels.tolist())
    assert ours.read(0).image == Path(ours.name(0)).read_bytes()


def test_hidden_folders_are_no_classes(classes) -> None:
    root = classes(a=1, b=1)
    (root / ".cache").mkdir()
    assert ClassFolder(root).classes == ("a", "b")


def test_names_come_from_json_or_lines(classes, tmp_path: Path) -> None:
    root = classes(n1=1, n2=1)
    assert ClassFolder(root).readable_names() == {}
    (root / "classes.txt").write_text("a cat\na dog\n")
    assert ClassFolder(root).readable_names() == {"n1": "a cat", "n2": "a dog"}
    (root / "classes.json").write_text(json.dumps({"n2": "hound", "n1": "tabby", "n3": "unused"}))
    assert ClassFolder(root).readable_names() == {"n1": "tabby", "n2": "hound"}
    given = tmp_path / "given.txt"
    given.write_text("x\ny")
    assert ClassFolder(root).readable_names(given) == {"n1": "x", "n2": "y"}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("classes.txt", "one\n", "found 1 lines for the 2 sub-folders"),
        ("classes.json", '{"n1": "cat"}', "found none for n2"),
        ("classes.json", '{"n1": "cat", "n2": 5}', "found none for n2"),
        ("classes.json", '{"n1": ', "cannot be read"),
        ("classes.json", "5", "found none for n1, n2"),
    ],
)
def test_names_that_do_not_fit_are_refused(classes, name: str, text: str, told: str) -> None:
    root = classes(n1=1, n2=1)
    (root / name).write_text(text)
    with pytest.raises(UserError, match=told):
        ClassFolder(root).readable_names()


def test_folders_that_are_no_class_folders_are_told(classes, tmp_path: Path, jpeg) -> None:
    with pytest.raises(UserError, match="found no such folder"):
        ClassFolder(tmp_path / "gone" / "far")
    (tmp_path / "training").mkdir()
    with pytest.raises(UserError, match="did you mean 'training'"):
        ClassFolder(tmp_path / "trainin")
    with pytest.raises(UserError, match="found no sub-folder; "):
        ClassFolder(tmp_path / "training")
    (tmp_path / "training" / "x.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match="found no sub-folder and 1 images beside"):
        ClassFolder(tmp_path / "training")
    with pytest.raises(UserError, match="Not a directory"):
        ClassFolder(tmp_path / "training" / "x.jpg")
    with pytest.raises(UserError, match="the one sub-folder only; "):
        ClassFolder(classes("one", only=2))
    with pytest.raises(UserError, match="1 of 3 without an image: b;"):
        ClassFolder(classes("empty", a=1, b=0, c=1))


def test_classes_that_differ_are_named(classes) -> None:
    train, val = ClassFolder(classes("train", a=1, b=1, c=1)), ClassFolder(classes("val", a=1, c=1, d=1))
    with pytest.raises(UserError, match=r"only in .*train: b \(1\); only in .*val: d \(1\)"):
        check_same_classes(train, val)
    check_same_classes(train, train)
