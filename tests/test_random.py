"""Counter-based random numbers: repeatable, independent of the batch, and evenly spread."""

import math
from collections import Counter

import pytest
import torch

import locfast.random
from locfast.kernels.philox import philox
from locfast.random import Keys, permute, randint, random_words, uniform


def keys(count: int, seed: int = 0, epoch: int = 0) -> Keys:
    return Keys(seed, torch.full((count,), epoch), torch.arange(count))


def chi_square_is_plausible(counts: list[int]) -> bool:
    """Within 5 standard deviations of the mean of the chi-square law (normal approximation)."""
    mean = sum(counts) / len(counts)
    statistic = sum((count - mean) ** 2 / mean for count in counts)
    freedom = len(counts) - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that come with Random123 for Philox-4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert tuple(philox(torch.tensor(counter), key).tolist()) == expected


def test_a_sample_draws_the_same_numbers_alone_and_in_any_batch():
    batch = uniform(keys(16, seed=3, epoch=2), "crop.image", 10)
    for i in (0, 7, 15):
        assert torch.equal(uniform(Keys.of(3, 2, i), "crop.image", 10)[0], batch[i])


def test_fewer_numbers_are_the_start_of_more():
    assert torch.equal(random_words(keys(5), "a", 3), random_words(keys(5), "a", 9)[:, :3])


def test_seed_epoch_index_and_stream_each_change_every_number():
    base = random_words(keys(1), "a", 64)
    assert (random_words(keys(1, seed=1), "a", 64) != base).all()
    assert (random_words(keys(1, seed=1 << 32), "a", 64) != base).all()
    assert (random_words(keys(1, epoch=1), "a", 64) != base).all()
    assert (random_words(Keys.of(0, 0, 1), "a", 64) != base).all()
    assert (random_words(keys(1), "b", 64) != base).all()


def test_uniform_numbers_lie_in_the_half_open_unit_interval_and_are_even():
    numbers = uniform(keys(2000), "u", 50).flatten()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert chi_square_is_plausible(torch.histc(numbers, 100, 0, 1).tolist())


def test_integers_are_even_and_reach_both_ends():
    counts = torch.bincount(randint(keys(4000), "i", 5, 7).flatten(), minlength=7)
    assert len(counts) == 7
    assert chi_square_is_plausible(counts.tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(size):
    assert permute(torch.arange(size), size, seed=5, epoch=3).sort().values.tolist() == list(range(size))


def test_permute_answers_each_position_by_itself():
    whole = permute(torch.arange(1000), 1000, 1, 2)
    some = torch.tensor([999, 3, 500])
    assert torch.equal(permute(some, 1000, 1, 2), whole[some])


def test_permute_takes_an_epoch_for_every_position():
    epoch = torch.arange(50) // 10
    mixed = permute(torch.arange(50) % 10, 10, 7, epoch)
    alone = torch.cat([permute(torch.arange(10), 10, 7, e) for e in range(5)])
    assert torch.equal(mixed, alone)


def test_permutations_of_three_are_equally_likely():
    epochs = torch.arange(6000).repeat_interleave(3)
    orders = permute(torch.arange(3).repeat(6000), 3, 11, epochs).view(-1, 3).tolist()
    counts = Counter(map(tuple, orders))
    assert len(counts) == 6
    assert chi_square_is_plausible(list(counts.values()))


@pytest.mark.parametrize("size", [4, 10, 16, 100])
def test_every_position_goes_everywhere_equally_often(size):
    draws = 400 * size
    for start in (0, size - 1):
        landed = permute(torch.full((draws,), start), size, 2, torch.arange(draws))
        assert chi_square_is_plausible(torch.bincount(landed, minlength=size).tolist())


@pytest.mark.parametrize(("size", "other"), [(5, 4), (10, 1), (10, 9), (16, 1)])
def test_where_two_samples_go_is_independent(size, other):
    epochs = torch.arange(150 * size * size)
    first = permute(torch.zeros_like(epochs), size, 4, epochs)
    second = permute(torch.full_like(epochs, other), size, 4, epochs)
    counts = torch.bincount(first * size + second, minlength=size * size).view(size, size)
    assert counts.diagonal().sum() == 0
    assert chi_square_is_plausible(counts[~torch.eye(size, dtype=torch.bool)].tolist())


def test_numpy_and_torch_make_the_same_words(monkeypatch):
    keys = Keys(2**63 - 5, torch.tensor([0, 3, 2**32 - 1]), torch.tensor([7, 2**32 - 1, 0]))
    small = random_words(keys, "a stream", 13)
    monkeypatch.setattr(locfast.random, "SMALL", 0)
    assert torch.equal(small, random_words(keys, "a stream", 13))
    assert small.dtype == torch.int64 and small.shape == (3, 13)
