"""RefCOCO: references of a split, and a pickle that is read without running anything."""

import os
import pickle
import pickletools

import pytest
from convert_files import put, refused, run, written


def ref(number: int, image: int, object: int, split: str, *sentences: str) -> dict:
    """As the datasets' refs(...).p have it."""
    return {
        "ref_id": number,
        "ann_id": object,
        "image_id": image,
        "file_name": f"COCO_train2014_{image:012}_{number}.jpg",
        "split": split,
        "category_id": 1,
        "sent_ids": list(range(len(sentences))),
        "sentences": [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": i, "sent": text}
            for i, text in enumerate(sentences)
        ],
    }


REFS = [
    ref(0, 581857, 1719310, "train", "navy blue shirt", "woman back in blue"),
    ref(1, 581857, 1719311, "train", "man"),
    ref(2, 9, 5, "testA", "left guy"),
    ref(3, 581857, 404, "train", "nobody"),
]


@pytest.fixture
def refcoco(tmp_path, jpeg):
    def image(id: int, width: int, height: int) -> dict:
        return {"file_name": f"COCO_train2014_{id:012}.jpg", "id": id, "width": width, "height": height, "license": 1}

    def object(id: int, image: int, box: list[float]) -> dict:
        return {"id": id, "image_id": image, "bbox": box, "category_id": 1, "iscrowd": 0, "area": 1.0}

    return put(
        tmp_path,
        {
            "train2014/COCO_train2014_000000581857.jpg": jpeg(64, 48),
            "train2014/COCO_train2014_000000000009.jpg": jpeg(40, 30),
            "refs(unc).p": pickle.dumps(REFS, protocol=0),
            "instances.json": {
                "images": [image(9, 40, 30), image(581857, 64, 48)],
                "annotations": [
                    object(1719310, 581857, [10.5, 4.25, 20.0, 30.0]),
                    object(1719311, 581857, [0, 0, 64, 48]),
                    object(5, 9, [1, 2, 3, 4]),
                ],
                "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
            },
            "captions.json": {"annotations": [{"image_id": 581857, "id": 1, "caption": "Two people."}]},
        },
    )


def arguments(root, *others: object) -> tuple[object, ...]:
    files = (root / "refs(unc).p", root / "instances.json")
    return ("refcoco", *files, "--images", root / "train2014", "--out", root / "refcoco.jsonl", *others)


def test_every_sentence_becomes_a_region_with_its_objects_box(refcoco, capsys):
    assert run(*arguments(refcoco, "--captions", refcoco / "captions.json")) == 0
    box = (10.5, 4.25, 30.5, 34.25)
    regions = [(box, "navy blue shirt"), (box, "woman back in blue"), ((0.0, 0.0, 64.0, 48.0), "man")]
    image = "train2014/COCO_train2014_000000581857.jpg"
    assert written(refcoco / "refcoco.jsonl") == [(image, "Two people.", regions)]
    assert "  dropped 1 region: an object that is not in instances.json\n" in capsys.readouterr().out


def test_one_sentence_of_an_object_where_asked(refcoco):
    run(*arguments(refcoco, "--first-sentence"))
    assert [text for _, text in written(refcoco / "refcoco.jsonl")[0][2]] == ["navy blue shirt", "man"]


def test_another_split_has_other_images_and_one_that_is_not_there_is_told_with_those_that_are(refcoco):
    run(*arguments(refcoco, "--split", "testA"))
    image = "train2014/COCO_train2014_000000000009.jpg"
    assert written(refcoco / "refcoco.jsonl") == [(image, None, [((1.0, 2.0, 4.0, 6.0), "left guy")])]
    told = refused(*arguments(refcoco, "--split", "test", "--overwrite"))
    assert "found references 3 of train, 1 of testA; take one of these splits" in told


def python_2(value: object) -> bytes:
    """A pickle of protocol 0 as Python 2 writes it: every str is STRING, not UNICODE."""
    if isinstance(value, dict):
        return b"(d" + b"".join(python_2(key) + python_2(one) + b"s" for key, one in value.items())
    if isinstance(value, list):
        return b"(l" + b"".join(python_2(one) + b"a" for one in value)
    return f"S{value!r}\n".encode() if isinstance(value, str) else f"I{value}\n".encode()


def test_pickles_of_python_2_and_of_every_protocol_read_the_same(refcoco):
    run(*arguments(refcoco))
    told = written(refcoco / "refcoco.jsonl")
    old = python_2(REFS) + b"."
    assert "STRING" in {code.name for code, _, _ in pickletools.genops(old)}
    for data in (old, *(pickle.dumps(REFS, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1))):
        put(refcoco, {"refs(unc).p": data})
        run(*arguments(refcoco, "--overwrite"))
        assert written(refcoco / "refcoco.jsonl") == told


class Trap:
    def __init__(self, folder: object) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_names_code_is_refused_and_nothing_of_it_runs(refcoco):
    put(refcoco, {"refs(unc).p": pickle.dumps([*REFS, Trap(refcoco / "sprung")])})
    told = refused(*arguments(refcoco))
    assert "found a pickle that is not of plain data (it asks for posix.mkdir)" in told
    assert not (refcoco / "sprung").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(REFS)[:-40], "found a file that is no whole pickle"),
        (b"", "found a file that is no whole pickle"),
        (pickle.dumps({"a": 1}), "found no list"),
        (pickle.dumps([{"image_id": 1}]), "it needs {image_id, ann_id, split"),
        (pickle.dumps([1, 2]), "it needs {image_id, ann_id, split"),
        (pickle.dumps([ref(0, 77, 5, "train", "x")]), "found one of image 77, which the file does not list"),
    ],
)
def test_references_that_are_not_as_published_are_refused(refcoco, data, message):
    put(refcoco, {"refs(unc).p": data})
    assert message in refused(*arguments(refcoco))
    assert not (refcoco / "refcoco.jsonl").exists()


def test_missing_files_are_named(refcoco):
    (refcoco / "refs(unc).p").unlink()
    assert "refs(unc).p, found no such file; check the path" in refused(*arguments(refcoco))
