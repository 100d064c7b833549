"""Flickr30k Entities: phrases of captions, boxes of pixels counted from 1, phrases with several boxes."""

import pytest
from convert_files import put, refused, run, written

XML = """<annotation>
\t<filename>36979.jpg</filename>
\t<size><width>64</width><height>48</height><depth>3</depth></size>
\t<object><name>1</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>40</ymax></bndbox></object>
\t<object><name>1</name><name>3</name>
\t\t<bndbox><xmin>31</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>
\t<object><name>2</name><scene>1</scene><nobndbox>1</nobndbox></object>
</annotation>
"""
SENTENCES = """[/EN#1/people A group of friends] sit in [/EN#2/scene a courtyard] .
[/EN#3/people/clothing The man in blue] looks at [/EN#0/notvisual it] .
"""


@pytest.fixture
def flickr(tmp_path, jpeg):
    return put(
        tmp_path,
        {
            "Annotations/36979.xml": XML,
            "Sentences/36979.txt": SENTENCES,
            "images/36979.jpg": jpeg(64, 48),
            "Sentences/65567.txt": "[/EN#9/animals A dog] .\n",
            "images/65567.jpg": jpeg(30, 20),
            "train.txt": "36979\n",
        },
    )


def arguments(root, *others: object) -> tuple[object, ...]:
    return ("flickr30k-entities", root, "--images", root / "images", "--out", root / "flickr.jsonl", *others)


FRIENDS, MAN = "A group of friends", "The man in blue"


def test_a_phrase_with_several_boxes_gets_one_around_them(flickr, capsys):
    assert run(*arguments(flickr)) == 0
    captions = ["A group of friends sit in a courtyard .", "The man in blue looks at it ."]
    regions = [((1.0, 0.0, 64.0, 48.0), FRIENDS), ((30.0, 0.0, 64.0, 48.0), MAN)]
    assert written(flickr / "flickr.jsonl") == [("images/36979.jpg", captions, regions)]
    out = capsys.readouterr().out
    assert "  dropped 1 image: no Annotations file, e.g. 65567.jpg\n" in out
    assert "  dropped 2 regions: a phrase without a box (not visual, the whole scene, or not seen)\n" in out


def test_or_a_region_for_each_where_asked(flickr):
    run(*arguments(flickr, "--several", "each"))
    second = (30.0, 0.0, 64.0, 48.0)
    assert written(flickr / "flickr.jsonl")[0][2] == [
        ((1.0, 2.0, 20.0, 40.0), FRIENDS),
        (second, FRIENDS),
        (second, MAN),
    ]


def test_a_split_has_the_images_of_its_file_alone(flickr, capsys):
    run(*arguments(flickr, "--split", flickr / "train.txt"))
    assert "65567" not in capsys.readouterr().out
    assert "cannot be read" in refused(*arguments(flickr, "--overwrite", "--split", flickr / "none.txt"))


@pytest.mark.parametrize("xml", ["<annotation>", "<annotation/>", XML.replace("<xmin>2<", "<xmin>two<")])
def test_annotations_that_cannot_be_read_cost_their_image(flickr, xml, capsys):
    box = "<object><name>9</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    size = "<size><width>30</width><height>20</height></size>"
    put(flickr, {"Annotations/36979.xml": xml, "Annotations/65567.xml": f"<annotation>{size}{box}</annotation>"})
    run(*arguments(flickr))
    assert written(flickr / "flickr.jsonl") == [("images/65567.jpg", "A dog .", [((0.0, 0.0, 9.0, 9.0), "A dog")])]
    assert "dropped 1 image: annotations that cannot be read, e.g. 36979.jpg" in capsys.readouterr().out


def test_a_folder_that_is_not_as_published_is_refused(flickr):
    told = refused("flickr30k-entities", flickr / "images", "--images", flickr / "images", "--out", flickr / "f.jsonl")
    assert "found no folders Annotations and Sentences side by side; unpack annotations.zip" in told
