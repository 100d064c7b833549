"""A box lands where it lies in the image, RoI-align is torchvision's, and nothing is left out unsaid."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align

from locfast.data.regions.annotated import AnnotatedBoxes
from locfast.data.sources import open_source
from locfast.data.spec import CropPolicy
from locfast.errors import UserError
from locfast.eval.global_ability.features import Reading, Tower
from locfast.eval.regions.reading import ANOTHER_SIZE, ANOTHER_VIEW, Looker, read_regions
from locfast.eval.regions.readings import ROI_ALIGN, RoiReading, embed_boxes, readings_of
from locfast.eval.regions.scores import recognise
from locfast.models.prompter import CrossPrompter, Prompter, RoiPooler
from tests.eval.region_files import COLOURS, NAMES, pictures, write_annotations, write_lines

READING = Reading(torch.device("cpu"), batch_size=5, workers=0)


class Pixels:
    """A backbone whose tokens are the pixels' colours in [-1, 1], one a pixel, so that a box's mean is its colour."""

    name, num_prefix_tokens, num_tokens, embed_dim, crop_pct, interpolation = "pixels", 0, 4096, 3, 0.9, "bilinear"
    mean = std = (0.5, 0.5, 0.5)
    model = SimpleNamespace(pretrained_cfg={})

    def __init__(self, side: int = 64) -> None:
        self.image_size = self.grid = (side, side)
        self.num_tokens = side * side

    def to(self, device: Any) -> None: ...

    def forward_features(self, images: Tensor, softcap: float | None = None) -> Tensor:
        return images.flatten(2).mT


def seer(crop: CropPolicy = "pad", side: int = 64) -> Looker:
    backbone: Any = Pixels(side)
    tower = Tower(backbone, None, lambda tokens: tokens.mean(1))
    return Looker(tower, crop, readings_of(tower, None, 7))


def colours() -> Tensor:
    return torch.tensor(list(COLOURS.values())) / 127.5 - 1


def read(source, lookers, count: int | None = None):
    return read_regions(source, lookers, READING, torch.arange(len(source) if count is None else count))


def recognised(found, key: tuple[str, str] = ("seer", ROI_ALIGN)) -> list[str]:
    return [NAMES[i] for i in recognise(found.regions[key], colours()).tolist()]


@pytest.mark.parametrize("crop", ["pad", "squash"])
@pytest.mark.parametrize("side", [64, 40])
def test_who_sees_only_colours_names_every_box(tmp_path: Path, crop: CropPolicy, side: int) -> None:
    found = read(open_source(str(write_lines(tmp_path))), {"seer": seer(crop, side)})
    assert found.phrases == [name.replace("_", " ") for _, _, boxes in pictures() for _, name in boxes]
    assert found.image_of.tolist() == [i for i in range(12) for _ in range(2)]
    assert recognised(found) == found.phrases and len(set(found.phrases)) == 4
    # not the box's class alone: its colour, to what JPEG and the box's resized rim cost
    expected = torch.stack([colours()[NAMES.index(name)] for name in found.phrases])
    assert (found.regions["seer", ROI_ALIGN] - expected).abs().max() < 0.25
    assert found.left_out == {"seer": {}}


def test_annotations_are_read_like_regions_and_a_rotated_image_too(tmp_path: Path) -> None:
    """A camera's picture lies on its side, with a note; COCO's sizes and boxes are of the upright one."""
    file = write_annotations(tmp_path, lvis=True)
    content = json.loads(file.read_text())
    path = tmp_path / "val2017" / f"{content['images'][1]['id']:012}.jpg"
    upright, note = Image.open(path), Image.Exif()
    note[0x0112] = 8  # shown turned by 90 degrees to the left
    upright.transpose(Image.Transpose.ROTATE_270).save(path, quality=95, subsampling=0, exif=note)
    found = read(AnnotatedBoxes(file), {"seer": seer()})
    assert recognised(found) == found.phrases and len(found.phrases) == 24
    assert found.left_out == {"seer": {}}


def test_boxes_in_an_image_of_another_size_than_listed_are_left_out_and_counted(tmp_path: Path) -> None:
    file = write_annotations(tmp_path)
    path = next((tmp_path / "val2017").glob("*.jpg"))
    Image.open(path).resize((20, 20)).save(path)
    found = read(AnnotatedBoxes(file), {"seer": seer(), "other": seer("squash")})
    assert len(found.phrases) == 22 and recognised(found) == found.phrases
    assert found.left_out == {"seer": {ANOTHER_SIZE: 2}, "other": {ANOTHER_SIZE: 2}}


def test_models_answer_the_same_boxes_and_those_that_a_view_lacks_are_counted(tmp_path: Path) -> None:
    lines = write_lines(tmp_path)
    values = [json.loads(line) for line in lines.read_text().splitlines()]
    # wide pictures: the outer tenth of each side is not in the square at their centre
    for number in (0, 3):
        width, height = pictures()[number][1]
        values[number]["regions"] += [{"box": [0, 0, 2, height], "text": "edge"}]
        values[number]["regions"] += [{"box": [width - 1, 3, width - 1.5, 5], "text": "swapped"}]
        values[number]["regions"] += [{"box": [width // 2, 5, width // 2 + 0.3, 5.2], "text": "a speck"}]
    lines.write_text("".join(json.dumps(value) + "\n" for value in values))
    source = open_source(str(lines))
    alone = read(source, {"seer": seer()})
    assert alone.phrases.count("edge") == alone.phrases.count("a speck") == 2  # however small
    assert alone.left_out == {"seer": {"swapped": 2}}
    both = read(source, {"seer": seer(), "centre": seer("center")})
    gone = len(alone.phrases) - len(both.phrases)
    assert "edge" not in both.phrases and gone >= 2
    assert both.left_out["seer"] == {"swapped": 2, ANOTHER_VIEW: gone}
    assert both.left_out["centre"] == {"swapped": 2, "left the view": gone}
    kept = [i for i, phrase in enumerate(alone.phrases) if phrase != "edge"]
    assert gone == 2 and both.regions["seer", ROI_ALIGN].equal(alone.regions["seer", ROI_ALIGN][kept])


def test_unreadable_images_and_their_boxes_are_left_out(tmp_path: Path) -> None:
    lines = write_lines(tmp_path)
    (tmp_path / "3.jpg").write_bytes(b"<html>404</html>")
    found = read(open_source(str(lines)), {"seer": seer()})
    assert len(found) == 11 and list(found.unreadable) == [str(tmp_path / "3.jpg")]
    assert len(found.phrases) == 22 and recognised(found) == found.phrases
    assert found.index[found.image_of].tolist() == [i for i in range(12) if i != 3 for _ in range(2)]
    with pytest.raises(UserError, match="none of the regions"):
        values = [json.loads(line) for line in lines.read_text().splitlines()]
        for value in values:
            value["regions"] = [{"box": [5, 5, 5, 9], "text": "nothing"}]
        lines.write_text("".join(json.dumps(value) + "\n" for value in values))
        read(open_source(str(lines)), {"seer": seer()})


def test_roi_align_of_projected_patches_is_torchvisions() -> None:
    """Box by box and image by image, with rows in any order and at any chunk."""
    generator = torch.Generator().manual_seed(0)
    patches, matrix = torch.randn(3, 12, 8, generator=generator), torch.randn(8, 5, generator=generator)
    low, high = torch.rand(9, 2, generator=generator) * 0.5, torch.rand(9, 2, generator=generator) * 0.5 + 0.5
    boxes, rows = torch.cat([low, high], 1), torch.tensor([2, 0, 0, 2, 2, 0, 2, 0, 2])
    reading = RoiReading(lambda tokens: tokens[:, 0] @ matrix, (3, 4), 5)
    expected = []
    for box, row in zip(boxes, rows.tolist(), strict=True):
        grid = (patches[row] @ matrix).T.view(1, 5, 3, 4)
        place = torch.tensor([[0, box[0] * 4, box[1] * 3, box[2] * 4, box[3] * 3]])
        expected.append(roi_align(grid, place, 5, aligned=True).mean((-2, -1))[0])
    for chunk in (1, 4, 64):
        # sums of 8 products in another order: a few ulps of numbers around 3
        torch.testing.assert_close(
            embed_boxes(reading, patches, boxes, rows, chunk), torch.stack(expected), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", [Prompter, CrossPrompter])
def test_a_prompter_is_asked_about_each_box_of_its_own_image(kind) -> None:
    generator = torch.Generator().manual_seed(1)
    prompter = kind(16, 6).eval()
    patches = torch.randn(4, 9, 16, generator=generator)
    boxes, rows = torch.rand(7, 4, generator=generator).sort(1).values, torch.tensor([3, 3, 0, 1, 1, 1, 3])
    expected = torch.cat(
        [prompter(patches[row][None], box[None, None])[0] for box, row in zip(boxes, rows.tolist(), strict=True)]
    )
    for chunk in (2, 64):
        torch.testing.assert_close(embed_boxes(prompter, patches, boxes, rows, chunk), expected, atol=1e-5, rtol=1e-5)


def test_a_model_trained_with_roi_align_is_read_by_its_own_pooling() -> None:
    tower, pooler = seer().tower, RoiPooler(3, 3, (64, 64))
    assert readings_of(tower, pooler, 7) == {ROI_ALIGN: pooler}
    prompter = Prompter(16, 6)
    assert list(readings_of(tower, prompter, 7)) == ["prompter", ROI_ALIGN]
    assert list(readings_of(tower, None, 7)) == [ROI_ALIGN]


def test_embeddings_that_are_not_finite_are_told(tmp_path: Path) -> None:
    looker = seer()
    broken = replace(looker, readings={ROI_ALIGN: RoiReading(lambda tokens: tokens[:, 0] / 0, (64, 64), 7)})
    with pytest.raises(UserError, match=r"features of seer \(RoI-align\) are not finite"):
        read(open_source(str(write_lines(tmp_path))), {"seer": broken})


def test_pictures_are_jpegs_of_many_shapes() -> None:
    made = pictures()
    assert {Image.open(io.BytesIO(data)).format for data, _, _ in made} == {"JPEG"}
    assert len({size for _, size, _ in made}) == 6


def test_a_pooling_that_was_trained_on_another_grid_is_refused():
    tower: Any = SimpleNamespace(backbone=Pixels(6))
    with pytest.raises(UserError, match="trained on 4 x 4 patches, here are 6 x 6"):
        readings_of(tower, RoiPooler(8, 8, (4, 4)), 7)
