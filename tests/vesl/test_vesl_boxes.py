"""From a detector's boxes to regions in pixels of the image."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from locfast.vesl.boxes import regions
from locfast.vesl.pixels import framed


def found(boxes, scores, labels=None, size=(100, 200), side=64, inside=(32, 64), **choice):
    labels = torch.zeros(len(scores), dtype=torch.int64) if labels is None else torch.tensor(labels)
    phrases = ["a dog", "a cat"]
    return regions(torch.tensor(scores), labels, torch.tensor(boxes), phrases, size, side=side, inside=inside, **choice)


def test_a_box_of_a_padded_frame_is_in_pixels_of_the_longer_side() -> None:
    """Height 100, width 200, padded to 200 x 200: the frame's middle is at the image's lower edge."""
    (region,), degenerate = found([[0.25, 0.25, 0.5, 0.5]], [0.9])
    assert region.box == (0, 0, 100, 100) and region.text == "a dog" and region.score == 0.9 and degenerate == 0


@pytest.mark.parametrize("size", [(333, 500), (500, 333), (7, 1000), (1024, 683)])
def test_a_box_around_what_is_shown_is_the_whole_image(size: tuple[int, int]) -> None:
    """The short side is shown in whole pixels: 333 x 500 in 298 of 448, where 298.4 would have its proportions."""
    side = 448
    high, wide = inside = _inside(size, side)
    shown = [wide / 2 / side, high / 2 / side, wide / side, high / side]
    half = [wide / 4 / side, high / 4 / side, wide / 2 / side, high / 2 / side]
    kept, _ = found([shown, half], [0.9, 0.8], size=size, side=side, inside=inside)
    exact = torch.tensor([[0.0, 0, size[1], size[0]], [0, 0, size[1] / 2, size[0] / 2]])
    # boxes are in fp32, half an ulp of 1 (6e-8) times 1000 pixels, and told to 1/100
    torch.testing.assert_close(torch.tensor([region.box for region in kept]), exact, rtol=0, atol=0.006)


@pytest.mark.parametrize("size", [(32, 64), (64, 48), (224, 448), (480, 640), (100, 200)])
def test_boxes_are_those_of_transformers_where_the_shown_part_is_whole_pixels(models, size: tuple[int, int]) -> None:
    """transformers scales both axes by the longer side; elsewhere the frame shows a rounded part, and ours differ."""
    import transformers as hf

    processor = hf.Owlv2Processor.from_pretrained(models / "owlv2")
    assert all(edge * 64 % max(size) == 0 for edge in size)
    centres = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.05
    boxes = torch.cat([centres, centres.flip(1) * 0.5 + 0.05], -1)
    logits = torch.linspace(-3, 3, 40)[:, None]
    out = hf.models.owlv2.modeling_owlv2.Owlv2ObjectDetectionOutput(logits=logits[None], pred_boxes=boxes[None])
    (theirs,) = processor.post_process_grounded_object_detection(out, threshold=0.1, target_sizes=[size])
    scores = logits[:, 0].sigmoid()
    kept, _ = found(boxes.tolist(), scores.tolist(), size=size, inside=_inside(size, 64))
    clipped = theirs["boxes"].clamp(min=0).minimum(torch.tensor([size[1], size[0], size[1], size[0]]))
    whole = ((clipped[:, 2:] - clipped[:, :2]) >= 1).all(-1)
    expected = clipped[whole][theirs["scores"][whole].argsort(descending=True, stable=True)]
    assert len(kept) > 20
    torch.testing.assert_close(torch.tensor([region.box for region in kept]), expected, rtol=0, atol=0.006)


def _inside(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Of a real frame."""
    file = io.BytesIO()
    Image.new("RGB", size[::-1]).save(file, "PNG")
    return framed(file.getvalue(), side, True).inside


def test_a_box_of_a_squashed_frame_is_scaled_by_both_sides() -> None:
    (region,), _ = found([[0.5, 0.5, 0.5, 0.5]], [0.9], inside=(64, 64))
    assert region.box == (50, 25, 150, 75)


def test_boxes_are_clipped_and_those_in_the_padding_are_degenerate() -> None:
    kept, degenerate = found([[0.5, 0.5, 2.0, 2.0], [0.5, 0.9, 0.2, 0.1], [0.5, 0.2, 0.001, 0.1]], [0.9, 0.8, 0.7])
    assert [region.box for region in kept] == [(0, 0, 200, 100)] and degenerate == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_boxes_that_are_not_finite_are_degenerate(bad: float) -> None:
    assert found([[0.5, 0.2, bad, 0.1]], [0.9]) == ((), 1)


def test_a_score_must_be_above_the_least_and_a_nan_is_not() -> None:
    box = [0.2, 0.2, 0.2, 0.2]
    kept, degenerate = found([box] * 4, [0.5, 0.25, float("nan"), 0.26], min_score=0.25)
    assert [region.score for region in kept] == [0.5, 0.26] and degenerate == 0


def test_the_surest_come_first_and_equal_ones_in_the_detectors_order() -> None:
    boxes = [[0.1 * i + 0.1, 0.2, 0.1, 0.1] for i in range(4)]
    kept, _ = found(boxes, [0.3, 0.9, 0.3, 0.5])
    assert [region.box[0] for region in kept] == [30, 70, 10, 50]
    assert [region.score for region in found(boxes, [0.3, 0.9, 0.3, 0.5], max_regions=2)[0]] == [0.9, 0.5]


def test_nms_is_off_unless_asked_for_and_leaves_other_phrases_alone() -> None:
    boxes = [[0.2, 0.2, 0.2, 0.2], [0.21, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]]
    scores, labels = [0.6, 0.9, 0.5], [0, 0, 1]
    assert len(found(boxes, scores, labels)[0]) == 3
    assert [(r.text, r.score) for r in found(boxes, scores, labels, nms=0.5)[0]] == [("a dog", 0.9), ("a cat", 0.5)]
