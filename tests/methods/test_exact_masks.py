"""Masks with an exact count: UTA's block-wise ones with reversal (figure 3, table 8) and MAE's random ones."""

import pytest
import torch

from locfast.methods import masks
from tests.methods.test_masks import keys

GRID = (16, 16)
PATCHES = 256
SAMPLES = 5000  # as in UTA's figure 3
KINDS = ("random", "block", "reversed_block")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grid", "count"), [((16, 16), 154), ((16, 16), 128), ((14, 14), 49), ((6, 6), 22), ((27, 27), 365)]
)
def test_every_sample_has_exactly_the_asked_count(kind: str, grid: tuple[int, int], count: int) -> None:
    visible = masks.exact(keys(200), grid, count, kind)
    assert visible.shape == (200, grid[0] * grid[1]) and (visible.sum(1) == count).all()
    assert len(visible.unique(dim=0)) > 190


@pytest.mark.parametrize("count", [154, 128, 77], ids=["ratio 0.4", "ratio 0.5", "ratio 0.7"])
@pytest.mark.parametrize("kind", ["reversed_block", "random"])
def test_the_probability_of_being_hidden_is_flat_over_positions(kind: str, count: int) -> None:
    hidden = ~masks.exact(keys(SAMPLES), GRID, count, kind)
    expected = 1 - count / PATCHES
    error = (expected * (1 - expected) / SAMPLES) ** 0.5
    assert (hidden.double().mean(0) - expected).abs().max() < 4 * error


@pytest.mark.parametrize(("grid", "count"), [((15, 15), 135), ((5, 5), 15), ((3, 5), 9), ((7, 7), 20)])
def test_an_odd_number_of_patches_is_flat_too(grid: tuple[int, int], count: int) -> None:
    samples = 40_000  # of small grids; reversed in half of the samples, they are 4.1 to 5.8 standard errors off
    hidden = ~masks.exact(keys(samples if grid[0] < 15 else SAMPLES), grid, count, "reversed_block")
    expected = 1 - count / (grid[0] * grid[1])
    assert (hidden.double().mean(0) - expected).abs().max() < 4 * (expected * (1 - expected) / len(hidden)) ** 0.5


def test_blocks_without_reversal_hide_the_centre_far_more_often_than_the_corners() -> None:
    share = (~masks.exact(keys(SAMPLES), GRID, 154, "block")).double().mean(0).view(GRID)
    centre, corners = share[6:10, 6:10].mean(), share[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert centre > 0.5 > 0.4 > 0.25 > corners


def test_reversed_blocks_are_made_of_blocks() -> None:
    """Neighbours share their fate far more often than under random masks, whichever half is hidden."""

    def alike(kind: str) -> float:
        visible = masks.exact(keys(500), GRID, 128, kind).view(-1, *GRID)
        return (visible[:, :, 1:] == visible[:, :, :-1]).double().mean().item()

    assert alike("reversed_block") > 0.8 > 0.55 > alike("random")


def test_grown_blocks_overlap_the_count_by_nothing() -> None:
    for count in (1, 15, 16, 17, 128, 255):
        assert (masks.grow_blocks(keys(100), GRID, count).sum(1) == count).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_its_mask_whatever_its_batch(kind: str) -> None:
    whole = masks.exact(keys(64), GRID, 154, kind)
    k = keys(64)
    part = masks.exact(type(k)(k.seed, k.epoch[5:9], k.index[5:9]), GRID, 154, kind)
    assert torch.equal(part, whole[5:9])
    assert not torch.equal(masks.exact(keys(64, seed=1), GRID, 154, kind), whole)
    assert not torch.equal(masks.exact(keys(64, epoch=1), GRID, 154, kind), whole)


def test_indices_are_those_of_the_visible_patches_in_order() -> None:
    visible = masks.exact(keys(20), GRID, 154, "reversed_block")
    found = masks.indices(visible, 154)
    for row, mask in zip(found, visible, strict=True):
        assert torch.equal(row, mask.nonzero()[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_the_same_bits_on_a_gpu(kind: str) -> None:
    there = masks.exact(keys(1000).to("cuda"), GRID, 154, kind)
    assert torch.equal(there.cpu(), masks.exact(keys(1000), GRID, 154, kind))
    assert torch.equal(masks.indices(there, 154).cpu(), masks.indices(there.cpu(), 154))
