"""The detector against transformers' own processor and call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from locfast.vesl.detector import Detector
from locfast.vesl.pixels import framed, whole
from tests.vesl.conftest import PHOTOS, jpeg

CPU = torch.device("cpu")
PHRASES = [["a red dog", "the cat", "tree"], ["a blue ball"], ["grass", "a dog"]]
FP32 = dict(rtol=0, atol=5e-6)
"""Scores and boxes lie in [0, 1]; products of other batch sizes differ by some units of 6e-8 over two small towers."""


def frames(side: int = 64) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Three images whose longer side is that of the frame, so that nothing is resized."""
    shapes = [(side, 40), (30, side), (side, side)]
    made = np.zeros((3, side, side, 3), np.uint8)
    for frame, (height, width), seed in zip(made, shapes, range(3), strict=True):
        frame[:height, :width] = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(made), shapes


@pytest.fixture
def plain(models):
    """transformers' own call for one image: scores, labels and boxes of all patches."""
    import transformers as hf

    model = hf.Owlv2ForObjectDetection.from_pretrained(models / "owlv2").eval()
    processor = hf.Owlv2Processor.from_pretrained(models / "owlv2")

    @torch.inference_mode()
    def call(image: np.ndarray, phrases: list[str], side: int = 64):
        size = {"height": side, "width": side}
        inputs = processor(text=[phrases], images=image, return_tensors="pt", images_kwargs={"size": size})
        out = model(**inputs, interpolate_pos_encoding=True)
        best = out.logits[0].max(-1)
        return inputs["pixel_values"][0], best.values.sigmoid(), best.indices, out.pred_boxes[0]

    return call


def test_a_batch_gives_what_transformers_gives_image_by_image(models, plain) -> None:
    """At another size than the model's own, with different numbers of phrases."""
    images, inside = frames()
    detector = Detector(str(models / "owlv2"), 64, CPU, "fp32")
    scores, labels, boxes = detector.detect(images, inside, PHRASES)
    for i, (height, width) in enumerate(inside):
        _, score, label, box = plain(images[i, :height, :width].numpy(), PHRASES[i])
        torch.testing.assert_close(scores[i], score, **FP32)
        torch.testing.assert_close(boxes[i], box, **FP32)
        assert torch.equal(labels[i], label)
    assert len(labels.unique()) > 1  # or the labels would say nothing


def test_images_are_padded_and_normalised_as_by_the_processor(models, plain) -> None:
    images, inside = frames()
    pixels = Detector(str(models / "owlv2"), 64, CPU, "fp32")._pixels(images, inside)
    for i, (height, width) in enumerate(inside):
        expected, *_ = plain(images[i, :height, :width].numpy(), PHRASES[i])
        torch.testing.assert_close(pixels[i], expected, rtol=0, atol=2e-6)  # values to 3: ulp 2.4e-7, a few roundings


def test_a_phrase_that_pads_never_wins(models) -> None:
    """transformers pads with a blank phrase that its mask does not hide: that looks for token 0, which begins none."""
    images, inside = frames()
    _, labels, _ = Detector(str(models / "owlv2"), 64, CPU, "fp32").detect(images, inside, PHRASES)
    assert all(int(row.max()) < len(each) for row, each in zip(labels, PHRASES, strict=True))


def test_each_phrase_is_encoded_once_a_chunk(models, monkeypatch) -> None:
    detector = Detector(str(models / "owlv2"), 64, CPU, "fp32")
    asked: list[str] = []
    embed = detector._embed
    monkeypatch.setattr(detector, "_embed", lambda phrases: asked.extend(phrases) or embed(phrases))
    images, inside = frames()
    first = detector.detect(images, inside, [["dog", "cat"], ["cat"], ["dog"]])
    again = detector.detect(images, inside, [["dog", "cat"], ["cat"], ["dog"]])
    assert asked == ["dog", "cat"] and all(map(torch.equal, first, again))
    detector.forget()
    detector.detect(images, inside, [["cat"], ["cat"], ["cat"]])
    assert asked == ["dog", "cat", "cat"]


def test_phrases_longer_than_the_text_tower_are_cut(models) -> None:
    images, inside = frames()
    detector = Detector(str(models / "owlv2"), 64, CPU, "fp32")
    scores, _, _ = detector.detect(images, inside, [["a dog " * 40], ["a"], ["b"]])
    assert scores.isfinite().all()


def test_bf16_gives_nearly_the_same_scores_and_fp32_boxes(models) -> None:
    images, inside = frames()
    full = Detector(str(models / "owlv2"), 64, CPU, "fp32").detect(images, inside, PHRASES)
    half = Detector(str(models / "owlv2"), 64, CPU, "bf16").detect(images, inside, PHRASES)
    assert half[2].dtype == torch.float32
    # Two towers of two blocks each round to 8 bits; a box of another patch would be off by 1/4.
    assert (half[2] - full[2]).abs().mean() < 0.02 and (half[0] - full[0]).abs().mean() < 0.05


def test_owlvit_squashes_as_its_processor_does(models) -> None:
    detector = Detector(str(models / "owlvit"), 64, CPU, "fp32")
    assert not detector.pads and framed(jpeg(3), 64, detector.pads).inside == (64, 64)
    images, _ = frames()
    scores, _, _ = detector.detect(images, [(64, 64)] * 3, PHRASES)
    assert scores.shape == (3, 16) and scores.isfinite().all()


@pytest.mark.parametrize("turned", [1, 3, 6, 8])
def test_a_frame_holds_the_upright_image(turned: int) -> None:
    one = framed(jpeg(5, turned), 64, True)
    height, width = one.size
    assert (height > width) == (turned in (6, 8)) and whole(jpeg(5, turned)).shape == (height, width, 3)
    assert max(one.inside) == 64 and one.ending == "jpg"
    assert abs(one.inside[0] / one.inside[1] - height / width) < 0.02
    assert one.pixels[: one.inside[0], : one.inside[1]].any() and not one.pixels[one.inside[0] :].any()


def test_photographs_are_framed() -> None:
    files = sorted(PHOTOS.glob("*.jpg"))[:3]
    if not files:
        pytest.skip(f"no {PHOTOS}")
    for file in files:
        one = framed(file.read_bytes(), 448, True)
        assert one.pixels.shape == (448, 448, 3) and max(one.inside) == 448
        # a shrunk photograph keeps its mean to a few grey levels
        shown = one.pixels[: one.inside[0], : one.inside[1]].astype(float)
        assert abs(shown.mean() - whole(file.read_bytes()).mean()) < 2
