"""The mask distributions of MaskEmbed."""

import pytest
import torch

from locfast.methods import masks
from locfast.random import Keys

GRID = (7, 7)
PATCHES = 49


def keys(samples: int, *, seed: int = 0, epoch: int = 0) -> Keys:
    return Keys(seed, torch.full((samples,), epoch), torch.arange(samples))


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_number_of_visible_patches_is_uniform_with_both_ends() -> None:
    visible = masks.uniform_count(keys(20_000), PATCHES)
    counts = torch.bincount(visible.sum(1), minlength=PATCHES + 1).double()
    # 99.9 % quantile of chi-square with 49 degrees of freedom; the draw is fixed by its keys.
    assert chi_square(counts) < 85.4
    assert counts[0] > 0 and counts[-1] > 0


def test_every_patch_is_visible_equally_often() -> None:
    visible = masks.uniform_count(keys(20_000), PATCHES)
    # Means of 20,000 coin flips; patches of one mask are correlated, samples are not: 5 standard errors of 0.0035.
    assert (visible.double().mean(0) - 0.5).abs().max() < 0.0177


def test_views_are_the_mask_its_complement_and_everything() -> None:
    visible = masks.uniform_count(keys(50), PATCHES)
    views = masks.with_views(visible, complement=True, all_visible=True)
    assert views.shape == (50, 3, PATCHES)
    assert torch.equal(views[:, 0], visible)
    assert torch.equal(views[:, 1], ~visible)
    assert views[:, 2].all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda k: masks.uniform_count(k, PATCHES),
        lambda k: masks.bernoulli(k, PATCHES, 0.5),
        lambda k: masks.blocks(k, GRID, 0.4),
    ],
    ids=["uniform", "bernoulli", "block"],
)
def test_masks_repeat_with_the_seed_and_differ_between_samples_and_epochs(draw) -> None:
    first = draw(keys(64))
    assert torch.equal(first, draw(keys(64)))
    assert not torch.equal(first, draw(keys(64, epoch=1)))
    assert not torch.equal(first, draw(keys(64, seed=1)))
    assert len(first.unique(dim=0)) > 55


def test_masks_of_a_sample_do_not_depend_on_its_batch() -> None:
    whole = masks.blocks(keys(32), GRID, 0.4)
    alone = masks.blocks(Keys(0, torch.tensor([0]), torch.tensor([17])), GRID, 0.4)
    assert torch.equal(whole[17:18], alone)


def test_bernoulli_keeps_the_fraction_asked_for() -> None:
    visible = masks.bernoulli(keys(5_000), PATCHES, 0.25)
    # 245,000 coin flips of standard deviation 0.433: 5 standard errors.
    assert abs(visible.double().mean().item() - 0.25) < 0.0044


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (3, 3), (1, 2)])
@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.5, 0.9])
def test_block_masks_uncover_enough_and_are_neither_empty_nor_full(grid: tuple[int, int], fraction: float) -> None:
    visible = masks.blocks(keys(400), grid, fraction)
    share = visible.double().mean(1)
    assert visible.any(1).all() and not visible.all(1).any()
    patches = grid[0] * grid[1]
    # Full masks give one patch back, which may leave the smallest grids just short of the fraction.
    assert (share >= fraction - 1 / patches).all()


def test_block_masks_are_made_of_rectangles() -> None:
    visible = masks.blocks(keys(200), (14, 14), 0.4).view(-1, 14, 14)
    # In a rectangle of at least 16 patches most neighbours agree; for independent patches half of them would.
    agree = (visible[:, 1:] == visible[:, :-1]).double().mean()
    assert agree > 0.85
