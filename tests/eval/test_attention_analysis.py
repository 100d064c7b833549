"""Attention distance against closed forms, spectra against torch.linalg, and one pass over images for both."""

import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locfast.data.spec import Record
from locfast.errors import UserError
from locfast.eval.analysis.distance import pairwise_distances, reach
from locfast.eval.analysis.run import Model, chosen_images, default_queries, patch_at, watch
from locfast.eval.analysis.spectrum import Covariance, log10_difference, spectrum
from locfast.eval.global_ability.features import Reading
from locfast.models.attention_maps import layer_by_layer
from locfast.models.backbone import Backbone, load_backbone
from tests.models.model_families import enliven

CPU = Reading(torch.device("cpu"), batch_size=5)


def tiny(name: str = "vit_base_patch16_clip_224", **args: object) -> Backbone:
    return enliven(load_backbone(name, False, image_size=64, depth=2, embed_dim=48, num_heads=4, **args))


class Pictures:
    """Noise as PNG files; the one at `bad` is damaged."""

    def __init__(self, count: int, bad: int | None = None) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> Record:
        file = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        return Record(b"nothing" if index == self.bad else file.getvalue(), self.name(index))


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (14, 14), (3, 5)])
def test_uniform_attention_reaches_the_mean_distance_of_the_grid(grid: tuple[int, int]) -> None:
    """Over patches at (i + 0.5) / n: every pair, each patch with itself too."""
    count = grid[0] * grid[1]
    places = [((i + 0.5) / grid[0], (j + 0.5) / grid[1]) for i, j in itertools.product(*map(range, grid))]
    mean = sum(math.dist(a, b) for a in places for b in places) / count**2
    found = reach(torch.full((2, 3, count, count), 1 / count), pairwise_distances(grid))
    assert found.distance.shape == (2, 3)
    # weights of fp32 in sums of 196
    torch.testing.assert_close(found.distance, torch.full((2, 3), mean, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.among_patches, found.distance, rtol=1e-5, atol=0)
    assert found.to_prefix.abs().max() < 1e-5


def test_autocast_does_not_round_distances() -> None:
    attention = torch.full((1, 1, 197, 197), 1 / 197)
    with torch.autocast("cpu", torch.bfloat16):
        found = reach(attention, pairwise_distances((14, 14)))
    assert all(map(torch.equal, found, reach(attention, pairwise_distances((14, 14)))))


def test_two_patches_side_by_side_are_half_an_image_apart() -> None:
    assert pairwise_distances((1, 2)).tolist() == [[0, 0.5], [0.5, 0]]
    assert pairwise_distances((2, 2))[0, 3].item() == pytest.approx(math.sqrt(0.5))
    attention = torch.tensor([[0.25, 0.75], [0.5, 0.5]])[None, None]
    # mean over the two queries; the paper's sum over them is twice that
    assert reach(attention, pairwise_distances((1, 2))).distance.item() == pytest.approx((0.375 + 0.25) / 2)


def test_a_patch_that_looks_at_itself_reaches_nowhere() -> None:
    found = reach(torch.eye(16).expand(1, 2, 16, 16), pairwise_distances((4, 4)))
    assert found.distance.tolist() == found.among_patches.tolist() == found.to_prefix.tolist() == [[0, 0]]


def test_what_goes_to_prefix_tokens_counts_as_no_distance() -> None:
    """Uniform over 4 patches and 2 prefixes: two thirds of what uniform attention over the patches reaches."""
    over_patches = reach(torch.full((1, 1, 4, 4), 0.25), pairwise_distances((2, 2))).distance.item()
    found = reach(torch.full((1, 1, 6, 6), 1 / 6), pairwise_distances((2, 2)))
    assert found.distance.item() == pytest.approx(over_patches * 4 / 6)
    assert found.among_patches.item() == pytest.approx(over_patches)
    assert found.to_prefix.item() == pytest.approx(2 / 6)
    alone = torch.zeros(1, 1, 6, 6)
    alone[..., 0] = 1  # everybody looks at CLS
    told = reach(alone, pairwise_distances((2, 2)))
    assert (told.distance.item(), told.among_patches.item(), told.to_prefix.item()) == (0, 0, 1)


@pytest.mark.parametrize("count", [7, 100])
def test_spectrum_in_batches_is_that_of_the_stored_features(count: int) -> None:
    """Both of the C x C covariance and of the paper's images x images one; far from zero, in batches of 3."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64) * 2.0 ** -torch.arange(12)
    features = torch.randn(count, 12, generator=generator, dtype=torch.float64) @ mixing + 1000
    covariance = Covariance()
    for rows in features.split(3):
        covariance.add(rows)
    found = spectrum(covariance)
    stored = torch.linalg.svdvals(torch.cov(features.T))[: min(12, count - 1)]
    centred = features - features.mean(0)
    gram = torch.linalg.svdvals(centred @ centred.T / (count - 1))[: min(12, count - 1)]
    # fp64, of the largest value's size: eigenvalues are no more exact than that
    for expected in (stored, gram):
        torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-12 * expected[0].item())


def test_effective_rank_counts_directions() -> None:
    for used in (1, 3, 5):
        rows = torch.cat([torch.eye(5)[:used], -torch.eye(5)[:used]])
        covariance = Covariance()
        covariance.add(rows)
        found = spectrum(covariance)
        assert len(found.values) == used and found.effective_rank == pytest.approx(used)
    same = Covariance()
    same.add(torch.ones(4, 5))
    assert len(spectrum(same).values) == 0 and spectrum(same).effective_rank == 0


def test_difference_of_spectra_is_taken_at_shared_ranks() -> None:
    one, other = Covariance(), Covariance()
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    one.add(rows)
    other.add(rows[:, :4] * 10)
    difference = log10_difference(spectrum(other), spectrum(one))
    assert len(difference) == 4
    scaled = Covariance()
    scaled.add(rows * 10)
    torch.testing.assert_close(
        log10_difference(spectrum(scaled), spectrum(one)), torch.full((6,), 2.0, dtype=torch.float64), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kind", ["vit_base_patch16_clip_224", "beit_base_patch16_224"])
def test_one_pass_sees_what_all_images_at_once_show(kind: str) -> None:
    """Seven of nine images (one damaged, one not drawn), in batches of 5, under a cap."""
    backbone, source = tiny(kind), Pictures(9)
    backbone.crop_pct = 1.0  # pictures of the model's own size then pass as they are
    order = chosen_images(9, 8, 3).tolist()
    source.bad = order[2]
    queries = tuple(patch_at(((r + 0.5) / 4, (c + 0.5) / 4), (4, 4)) for r, c in default_queries((4, 4)))
    seen = watch(source, {"it": Model(backbone, 2.0, queries)}, CPU, limit=8, pictures=3, seed=3)
    read = [index for index in order if index != source.bad]
    assert seen.images == 7 and list(seen.unreadable) == [f"picture {source.bad}"]
    assert seen.names == tuple(f"picture {index}" for index in read[:3])
    images = torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(source.read(i).image)))) for i in read])
    found = seen.models["it"]
    assert np.abs(found.pixels.astype(int) - images[:3].numpy().astype(int)).max() <= 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        for layer in layer_by_layer(backbone, pixels, 2.0):
            attention = torch.cat(list(layer.attention()))
            expected = reach(attention, pairwise_distances((4, 4)))
            for one, two in zip(found.reach, expected, strict=True):
                torch.testing.assert_close(one[:, layer.number], two, rtol=1e-4, atol=1e-6)
            rows = layer.output[:, 1:].double().mean(1)
            values = found.spectra[f"block {layer.number + 1}"].values
            assert len(values) == 6  # images less one
            torch.testing.assert_close(values, torch.linalg.svdvals(torch.cov(rows.T))[:6], rtol=1e-3, atol=0)
    shown = attention[:3][:, :, [1 + q for q in queries], 1:].transpose(1, 2).reshape(3, 3, 4, 4, 4)
    np.testing.assert_allclose(found.maps, shown.numpy(), rtol=1e-4, atol=1e-6)
    assert ("final norm" in found.spectra) == backbone.has_final_norm == (not kind.startswith("beit"))


def test_a_point_is_in_the_same_place_of_every_grid() -> None:
    centre = (4.5 / 9, 4.5 / 9)
    assert patch_at(centre, (9, 9)) == 40 and patch_at(centre, (3, 3)) == 4 and patch_at((1.0, 1.0), (2, 2)) == 3


def test_less_than_two_readable_images_are_told() -> None:
    with pytest.raises(UserError, match="of which 1 could be read"):
        watch(Pictures(2, bad=0), {"it": Model(tiny(), None, ())}, CPU, limit=9, pictures=0, seed=0)


def test_the_figures_of_the_docs_are_those_of_their_file() -> None:
    root = Path(__file__).resolve().parents[2]
    told = json.loads((root / "benchmarks/results/cpu-demo/analyze/demo.json").read_text())["found"]["models"]["demo"]
    distance, page = told["distance"], (root / "docs/analyze.md").read_text(encoding="utf-8")
    for i, (mean, heads) in enumerate(zip(distance["by_layer"], distance["by_head"], strict=True)):
        prefix = 100 * sum(distance["to_prefix_by_head"][i]) / len(heads)
        rank = told["spectrum"][f"block {i + 1}"]["effective_rank"]
        line = f"| {i + 1} | {mean:.3f} | {min(heads):.3f} to {max(heads):.3f} | {prefix:.1f} % | {rank:.1f} |"
        assert line in page
    assert f"at most {max(distance['standard_error']):.4f}." in page
    for side in (14, 6):
        assert f"{pairwise_distances((side, side)).mean():.3f}" in page
